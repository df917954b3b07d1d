"""Models whose documents and padding a kernel keeps apart, beside the same models under a mask."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, StaticCache

from neox_hf.kernels.document_spans import DocumentSpans
from neox_hf.modeling.masks import causal_mask
from neox_hf.modeling.recompute import recompute_kwargs

LENGTH = 40


def given(kind):
    """Arguments of a forward pass, and which tokens count."""
    counted = torch.ones(2, LENGTH, dtype=torch.bool)
    if kind == "documents":
        rows = [[*range(13), *range(27)], [*range(LENGTH - 1), 0]]
        return {"position_ids": torch.tensor(rows)}, counted
    counted[0, : LENGTH // 3] = False
    if kind != "padding":
        counted[1, 5:9] = False
    mask = counted.long()
    return {"attention_mask": mask.t().contiguous().t() if kind == "transposed padding" else mask}, counted


def one_layer(make_model, kernels):
    """The interpreter takes seconds for each."""
    return make_model(kernels=kernels, num_hidden_layers=1)


def loss_and_gradients(model, ids, arguments, counted):
    loss = model(ids, labels=ids.masked_fill(~counted, -100), **arguments).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["documents", "padding", "padding with holes", "transposed padding"])
def test_loss_and_gradients_are_those_under_a_mask(kind, training, make_model, tokens):
    arguments, counted = given(kind)
    ids = tokens(length=LENGTH)
    found, wanted = (
        loss_and_gradients(one_layer(make_model, kernels).train(training), ids, arguments, counted)
        for kernels in ("triton", "torch")
    )
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_with_recomputation(mode, make_model, tokens):
    arguments, counted = given("documents")
    ids = tokens(length=LENGTH)
    model = one_layer(make_model, "triton").train()
    wanted = loss_and_gradients(model, ids, arguments, counted)
    again = one_layer(make_model, "triton").train()
    again.gradient_checkpointing_enable(recompute_kwargs(mode))
    found = loss_and_gradients(again, ids, arguments, counted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def spans_of(config, attention_mask=None, position_ids=None, cache=None):
    states = torch.zeros(2, 8, config.hidden_size)
    return causal_mask(config, states, attention_mask, position_ids, cache, config.kernels)


def test_where_a_kernel_takes_over(make_model):
    positions, padded = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), torch.ones(2, 8)
    padded[0, 0] = 0

    def kind(attention="sdpa", cache=None, **fields):
        config = make_model(attention=attention, **({"kernels": "triton"} | fields)).config
        masks = (
            spans_of(config, position_ids=positions, cache=cache and DynamicCache(config=config)),
            spans_of(config, attention_mask=padded, cache=cache and DynamicCache(config=config)),
        )
        return {type(mask) for mask in masks}

    assert kind() == {DocumentSpans}
    assert kind(kernels="torch") == {torch.Tensor}
    assert kind(kernels="auto") == {torch.Tensor}  # on a CPU
    assert kind(attention="eager") == {torch.Tensor}
    assert kind(attention_dropout=0.1) == {DocumentSpans}  # for the passes that drop nothing
    assert kind(cache=True) == {type(None), DocumentSpans}  # who brings a cache has no documents


def test_a_cache_that_has_seen_something_wants_a_mask(make_model, tokens):
    model = make_model(kernels="triton")
    seen = model(tokens(length=8), use_cache=True).past_key_values
    padded = torch.ones(2, 16)
    padded[0, 0] = 0
    assert isinstance(spans_of(model.config, attention_mask=padded, cache=seen), torch.Tensor)
    with_room = StaticCache(config=model.config, max_cache_len=16)
    assert isinstance(spans_of(model.config, attention_mask=padded[:, :8], cache=with_room), torch.Tensor)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_cache_that_is_brought_has_no_documents(kernels, make_pair, tokens):
    """As in transformers, which is so, too, where it makes the cache itself; there ours keep apart what is packed."""
    stock, ours = make_pair(kernels=kernels, num_hidden_layers=1)
    ids, (arguments, _) = tokens(length=LENGTH), given("documents")
    brought = [model(ids, **arguments, past_key_values=DynamicCache(config=model.config)) for model in (stock, ours)]
    torch.testing.assert_close(brought[1].logits, brought[0].logits)
    apart = stock(ids, **arguments, use_cache=False).logits
    assert not torch.allclose(brought[0].logits, apart, atol=1e-3)
    torch.testing.assert_close(ours(ids, **arguments, use_cache=True).logits, apart)


@pytest.mark.parametrize(
    "generation", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_generates_after_padding(generation, make_pair, tokens):
    ids, mask = tokens(length=12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    wanted, found = (
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **generation)
        for model in make_pair(kernels="triton", num_hidden_layers=1)
    )
    assert torch.equal(found, wanted)


def test_a_mask_of_another_shape_stays_transformers_matter(make_model):
    config = make_model(kernels="triton").config
    pairs = torch.zeros(2, 1, 8, 8)
    assert spans_of(config, attention_mask=pairs) is pairs
    longer = torch.cat((torch.ones(2, 8), torch.zeros(2, 4)), dim=1)  # padded to a length that is not there yet
    assert spans_of(config, attention_mask=longer) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["documents", "padding"])
def test_dropout(kind, training, make_model, tokens):
    """Torch drops, under a mask; where nothing is dropped the kernel computes."""
    ids = tokens(length=LENGTH)
    model = make_model(kernels="triton", attention_dropout=0.5).train(training)
    arguments, _ = given(kind)
    with torch.no_grad():
        first, second = (model(ids, **arguments).logits for _ in range(2))
    assert torch.equal(first, second) is not training


@pytest.mark.parametrize("kind", ["documents", "padding"])
def test_a_model_of_shapes_alone(kind, make_model, tokens):
    model, ids = make_model(kernels="triton").to("meta"), tokens(length=LENGTH).to("meta")
    arguments = {name: value.to("meta") for name, value in given(kind)[0].items()}
    assert model(ids, **arguments).logits.shape == (2, LENGTH, 64)


@pytest.mark.parametrize("kind", ["documents", "padding"])
def test_shapes_are_known_without_values(kind, make_model, tokens):
    """As a CUDA graph's capture has none, either."""
    model, ids = make_model(kernels="triton"), tokens(length=LENGTH)
    arguments, _ = given(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in arguments.items()}
        assert model(mode.from_tensor(ids), **fake).logits.shape == (2, LENGTH, 64)


def test_no_padding_is_plain_causal_attention(make_model):
    assert spans_of(make_model(kernels="triton").config, attention_mask=torch.ones(2, 8)) is None


@pytest.mark.parametrize("kind", ["documents", "transposed padding"])
def test_compiles_into_one_graph(kind, make_model, tokens):
    torch._dynamo.reset()
    arguments, counted = given(kind)
    ids = tokens(length=LENGTH)
    fields = {"kernels": "triton", "num_hidden_layers": 1}
    wanted = loss_and_gradients(make_model(**fields).train(), ids, arguments, counted)
    model = make_model(**fields).train()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    found = loss_and_gradients(model, ids, arguments | {"use_cache": False}, counted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
