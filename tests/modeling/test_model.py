"""The body: attention implementations, caches, hooks, inputs."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from neox_hf import GPTNeoXLayer, GPTNeoXModel
from neox_hf.modeling.bare import is_bare
from neox_hf.modeling.norms import GPTNeoXLayerNorm, affines_of, normalize_twice


def test_attention_implementation_is_switched_at_run_time(make_model, tokens, uncompiled):
    model = make_model().eval()
    seen = {}
    for name in ("sdpa", "eager", "flex_attention", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            seen.setdefault(name, []).append(model(tokens()).logits)
    assert torch.equal(*seen["sdpa"])
    assert torch.allclose(seen["eager"][0], seen["sdpa"][0], atol=1e-5)
    assert torch.allclose(seen["flex_attention"][0], seen["sdpa"][0], atol=1e-5)


def test_only_eager_attention_returns_weights(make_model, tokens):
    weights = make_model(attention="eager")(tokens(), output_attentions=True).attentions
    assert len(weights) == 2
    assert weights[0].shape == (2, 4, 16, 16)
    assert torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 16))
    assert not weights[0].triu(1).any()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_equal_one_pass(kind, make_model, tokens):
    model = make_model().eval()
    ids = tokens()
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    )
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        parts = [
            model(part, past_key_values=cache).logits for part in (ids[:, :9], ids[:, 9:12], *ids[:, 12:].split(1, 1))
        ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_batching_changes_nothing(make_model, tokens):
    model = make_model().eval()
    ids = tokens(rows=3)
    assert torch.allclose(model(ids).logits, torch.cat([model(row[None]).logits for row in ids]), atol=1e-5)


def test_hidden_states_end_with_the_normed_one(make_model, tokens):
    model = make_model(GPTNeoXModel)
    output = model(tokens(), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.embed_in(tokens()))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_wants_one_kind_of_input(make_model, tokens):
    model = make_model(GPTNeoXModel)
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds; found neither"):
        model()
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds; found both"):
        model(tokens(), inputs_embeds=model.embed_in(tokens()))


def test_unknown_activation_is_refused(make_config):
    with pytest.raises(ValueError, match="hidden_act='geluu' is unknown; choose one of"):
        GPTNeoXLayer(make_config(hidden_act="geluu"), 0)


def test_embeddings_can_be_replaced(make_model):
    model = make_model()
    embedding, head = nn.Embedding(9, 32), nn.Linear(32, 9, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.gpt_neox.embed_in is embedding
    assert model.get_output_embeddings() is head
    assert model(torch.tensor([[8]])).logits.shape == (1, 1, 9)


def test_a_hook_on_a_norm_is_heard(make_config):
    layer = GPTNeoXLayer(make_config(), 0)
    x, norms = torch.randn(1, 3, 32), (layer.input_layernorm, layer.post_attention_layernorm)
    quiet = normalize_twice(*norms, affines_of(*norms), x)
    assert is_bare(layer.post_attention_layernorm, GPTNeoXLayerNorm)
    heard = []
    handle = layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: heard.append(output))
    assert not is_bare(layer.post_attention_layernorm, GPTNeoXLayerNorm)
    loud = normalize_twice(*norms, affines_of(*norms), x)
    assert len(heard) == 1
    assert torch.equal(heard[0], quiet[2])
    assert torch.equal(loud[1], quiet[1])
    handle.remove()
    assert is_bare(layer.post_attention_layernorm, GPTNeoXLayerNorm)


def test_a_replaced_norm_is_called(make_config):
    layer = GPTNeoXLayer(make_config(), 0)
    layer.input_layernorm = nn.Identity()
    x, norms = torch.randn(1, 3, 32), (layer.input_layernorm, layer.post_attention_layernorm)
    assert torch.equal(normalize_twice(*norms, affines_of(*norms), x)[1], x)


def test_norms_are_torch_layer_norms(make_config):
    assert isinstance(GPTNeoXLayerNorm(make_config()), nn.LayerNorm)  # weight-decay filters look for the class


def test_replaced_loss_is_used(make_model, tokens):
    model = make_model()
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    assert model(tokens(), labels=tokens()).loss == 42


def test_shift_labels_alone_give_a_loss(make_model, tokens):
    model = make_model()
    ids = tokens()
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
