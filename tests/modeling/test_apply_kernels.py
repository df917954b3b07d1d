"""A stock model that `apply_kernels` has changed does what it did, in place."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf import GPTNeoXForCausalLM, apply_kernels
from neox_hf.modeling.layer import GPTNeoXLayer
from neox_hf.modeling.mlp import GELU
from neox_hf.modeling.norms import GPTNeoXLayerNorm
from neox_hf.parallel import Linear
from tests.modeling.stock_steps import assert_near, assert_same_step


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_parallel_residual": False},
        {"hidden_act": "gelu_fast", "attention_bias": False},
        {"hidden_act": "relu", "tie_word_embeddings": True},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_the_same_step(kernels, fields, make_pair, tokens):
    if kernels == "triton":
        fields = {"num_hidden_layers": 1, "num_attention_heads": 2} | fields
    before, after = make_pair(kernels=kernels, **fields)
    ids = tokens(length=8)
    assert_same_step(before, after, input_ids=ids, labels=ids, use_cache=False)


def test_every_part_computes_with_ours(make_stock):
    model = make_stock()
    parts = dict(model.named_modules())
    assert apply_kernels(model, "triton") is model
    assert dict(model.named_modules()) == parts
    layer = model.gpt_neox.layers[0]
    assert isinstance(layer, GPTNeoXLayer)
    kinds = {type(module) for module in layer.modules()}
    assert {Linear, GPTNeoXLayerNorm, GELU} < kinds
    assert not kinds & {nn.Linear, nn.LayerNorm}
    assert type(model.gpt_neox.final_layer_norm) is GPTNeoXLayerNorm
    chosen = [module.kernels for module in model.modules() if hasattr(module, "kernels")]
    # Embedding, head and loss, final norm; layer, attention, norms, activation, linears.
    assert chosen == ["triton"] * (1 + 1 + 1 + 2 * 9)


def test_triton_is_refused_where_it_cannot_run(make_pair, tokens):
    _, model = make_pair(kernels="triton")
    with pytest.raises(ValueError, match=r"kernels='triton', but .* was given torch.float64"):
        model.double()(tokens())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("batch", ["right padding", "packed", "offset positions", "num_items_in_batch"])
def test_every_kind_of_batch(batch, kernels, make_pair, tokens):
    ids = tokens()
    extra = {"use_cache": False}
    if batch == "right padding":
        extra["attention_mask"] = torch.ones_like(ids)
        extra["attention_mask"][0, 10:] = 0
    elif batch == "packed":
        extra["position_ids"] = torch.cat((torch.arange(7), torch.arange(9))).repeat(2, 1)
    elif batch == "offset positions":
        extra["position_ids"] = torch.arange(5, 21)[None]
    elif batch == "num_items_in_batch":
        extra["num_items_in_batch"] = torch.tensor(100)
    assert_same_step(*make_pair(kernels=kernels), input_ids=ids, labels=ids, **extra)


def test_scaled_positions(make_pair, tokens):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ids = tokens(length=80)
    assert_same_step(*make_pair(rope_parameters=rope), input_ids=ids, labels=ids, use_cache=False)


def test_dropout_draws_the_same_masks(make_stock, tokens):
    model = make_stock(attention="eager", hidden_dropout=0.2, attention_dropout=0.2).train()
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(model(tokens(), labels=tokens()).loss)
        apply_kernels(model, "torch")
    assert_near(*losses)


def test_hidden_states_and_attentions(make_stock, tokens):
    """Both where transformers has attached its recording hooks before, and where it does so after."""
    recorded, fresh = make_stock(attention="eager"), make_stock(attention="eager")
    wanted = recorded(tokens(), output_hidden_states=True, output_attentions=True)
    for model in (recorded, fresh):
        found = apply_kernels(model)(tokens(), output_hidden_states=True, output_attentions=True)
        assert len(found.hidden_states) == 3
        assert len(found.attentions) == 2
        both = (found.hidden_states + found.attentions, wanted.hidden_states + wanted.attentions)
        for ours, theirs in zip(*both, strict=True):
            assert_near(ours, theirs)


@pytest.mark.parametrize(
    "model_class",
    [stock.GPTNeoXForSequenceClassification, stock.GPTNeoXForTokenClassification, stock.GPTNeoXForQuestionAnswering],
)
def test_other_heads(model_class, make_pair, tokens):
    before, after = make_pair(model_class, pad_token_id=0)
    assert type(after) is model_class
    labels = {"labels": torch.tensor([0, 1])}
    if model_class is stock.GPTNeoXForTokenClassification:
        labels = {"labels": tokens() % 2}
    elif model_class is stock.GPTNeoXForQuestionAnswering:
        labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
        found, wanted = after(tokens(), **labels), before(tokens(), **labels)
        assert_near(found.start_logits, wanted.start_logits)
        assert_near(found.loss, wanted.loss)
        return
    assert_same_step(before, after, input_ids=tokens(), **labels)


def test_the_model_alone(make_pair, tokens):
    before, after = make_pair(stock.GPTNeoXModel)
    assert_near(after(tokens()).last_hidden_state, before(tokens()).last_hidden_state)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache, make_pair, tokens):
    before, after = make_pair()
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    wanted, found = (model.generate(tokens(), attention_mask=mask, **options) for model in (before, after))
    assert torch.equal(found, wanted)


def test_an_optimizer_made_before_goes_on(make_stock, tokens):
    ids = tokens()
    weights = []
    for switched in (False, True):
        model = make_stock()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            if switched and step == 1:
                apply_kernels(model, "torch")
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    for name, wanted in weights[0].items():
        assert_near(weights[1][name], wanted)


def test_saved_and_loaded_by_stock(make_pair, tokens, tmp_path):
    before, after = make_pair()
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert saved[0] == saved[1]
    loaded = stock.GPTNeoXForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(loaded(tokens()).logits, before(tokens()).logits)


def test_the_new_class_can_be_loaded_too(make_pair, tokens, tmp_path):
    """PEFT notes the class and the module of what it was given, and loads by them."""
    before, after = make_pair()
    before.save_pretrained(tmp_path)
    loaded = type(after).from_pretrained(tmp_path)
    wanted = before(tokens(), labels=tokens())
    for model in (loaded, apply_kernels(loaded)):
        found = model(tokens(), labels=tokens())
        assert_near(found.logits, wanted.logits)
        assert_near(found.loss, wanted.loss)


def test_the_configuration_and_the_classes_are_found(make_stock):
    model = make_stock()
    config, names = model.config, [type(module).__name__ for module in model.gpt_neox.layers[0].children()]
    apply_kernels(model)
    assert model.config is config
    assert not hasattr(config, "kernels")
    assert isinstance(model, stock.GPTNeoXForCausalLM)
    assert isinstance(model.gpt_neox, stock.GPTNeoXModel)
    assert isinstance(model.gpt_neox.layers[0], stock.GPTNeoXLayer)
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    layer = model.gpt_neox.layers[0]
    assert [type(module).__name__.replace("GPTNeoXLayerNorm", "LayerNorm") for module in layer.children()] == names


def test_weights_can_be_drawn_again_and_embeddings_resized(make_stock):
    model = apply_kernels(make_stock())
    frequencies = model.gpt_neox.rotary_emb.inv_freq.clone()
    model.resize_token_embeddings(80)
    assert model.get_output_embeddings().weight.shape[0] == 80
    for module in model.modules():
        model._init_weights(module)
    assert torch.equal(model.gpt_neox.rotary_emb.inv_freq, frequencies)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_attention_implementation_may_change_afterwards(recompute, make_pair, tokens):
    before, after = make_pair()
    for model in (before, after):
        model.set_attn_implementation("eager")
        if recompute:
            model.gradient_checkpointing_enable()
            model.train()
    assert_same_step(before, after, input_ids=tokens(), labels=tokens(), use_cache=False)


def test_saved_and_loaded_by_ours(make_pair, tmp_path, tokens):
    """Through the Auto classes, where this package has registered its own."""
    before, after = make_pair()
    after.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPTNeoXForCausalLM
    assert_near(apply_kernels(loaded)(tokens()).logits, before(tokens()).logits)


def test_compiled_whole(make_pair, tokens):
    before, after = make_pair(kernels="triton", num_hidden_layers=1)
    compiled = torch.compile(after, fullgraph=True, backend="aot_eager")
    ids = tokens(length=8)
    wanted, found = before(ids, labels=ids, use_cache=False), compiled(ids, labels=ids, use_cache=False)
    assert_near(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", [True, False])
def test_bf16_on_a_gpu_is_no_further_from_the_truth(parallel, make_stock, tokens):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "max_position_embeddings": 512}
    exact = make_stock(use_parallel_residual=parallel, **(sizes | {"initializer_range": 0.05})).cuda()
    ids = tokens(rows=4, length=512).cuda()
    low = copy.deepcopy(exact)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    ours = apply_kernels(copy.deepcopy(low))
    skipping = apply_kernels(copy.deepcopy(low), skip_logits=True).train()
    exact.load_state_dict(low.state_dict())
    truth = exact(ids, labels=ids, use_cache=False)
    truth.loss.backward()
    logits, gradients = [], []
    for model in (low, ours):
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        logits.append(
            float((output.logits.detach().float() - truth.logits.detach()).norm() / truth.logits.detach().norm())
        )
        gradients.append(gradient_error(model, exact))
        assert torch.allclose(output.loss.float(), truth.loss, rtol=2e-3)
    assert logits[1] <= 1.05 * logits[0]
    assert gradients[1] <= 1.05 * gradients[0]
    output = skipping(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert output.logits is None
    assert gradient_error(skipping, exact) <= 1.05 * gradients[0]


def gradient_error(model, exact):
    """Mean over the parameters of the relative distance of their gradients."""
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    errors = [(found.grad.float() - true.grad).norm() / true.grad.norm() for found, true in pairs]
    return float(torch.stack(errors).mean())
