"""Computing again in the backward pass changes memory and work, and no gradient."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neox_hf.modeling.recompute import recompute_kwargs
from neox_hf.parallel.data_parallel import accumulate_gradients_in_fp32

LAYERS, HIDDEN, ROWS, LENGTH = 2, 64, 4, 32
WIDTH_BYTES = ROWS * LENGTH * HIDDEN * 4
"""Bytes of one activation [B, S, H] in fp32."""


class Watch(TorchDispatchMode):
    """Names of the operations that ran, and the bytes of their results that are still alive."""

    def __init__(self):
        super().__init__()
        self.names, self.storages = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_alive(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())

    def count(self, part):
        return sum(part in name for name in self.names)


def step(make_model, mode, attention="sdpa", **fields):
    """Gradients, and what was watched in the forward and the backward pass of the blocks."""
    model = make_model(
        attention=attention, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, **fields
    ).train()
    arguments = recompute_kwargs(mode)
    if arguments is not None:
        model.activation_checkpointing_enable(arguments)
    tokens = torch.randint(0, 64, (ROWS, LENGTH))
    with Watch() as forward:
        hidden = model.gpt_neox(tokens, use_cache=False).last_hidden_state
        kept = forward.bytes_alive()
    with Watch() as backward:
        hidden.square().sum().backward()
    return {name: p.grad for name, p in model.gpt_neox.named_parameters()}, kept, backward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_gradients_to_the_bit_and_memory_in_between(make_model, attention, parallel, dropout):
    fields = {"use_parallel_residual": parallel, "hidden_dropout": dropout, "attention_dropout": dropout}
    wanted, most, _ = step(make_model, "none", attention, **fields)
    kept = {"none": most}
    for mode in ("selective", "full"):
        found, kept[mode], _ = step(make_model, mode, attention, **fields)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kept["full"] < kept["selective"] < kept["none"]


def test_selective_keeps_products_and_attention_and_nothing_else(make_model):
    _, full, _ = step(make_model, "full")
    _, selective, backward = step(make_model, "selective")
    _, none, plain = step(make_model, "none")
    # qkv 3 H, attention H, its projection H, the MLP's first product 4 H; and a number for each query.
    assert (selective - full) / LAYERS / WIDTH_BYTES == pytest.approx(9, abs=0.1)
    assert (none - full) / LAYERS / WIDTH_BYTES > 14
    assert backward.count("mm") == plain.count("mm")
    assert backward.count("scaled_dot_product") == plain.count("scaled_dot_product") == LAYERS
    assert backward.count("gelu") == 2 * plain.count("gelu")


def test_full_computes_products_again(make_model):
    _, _, backward = step(make_model, "full")
    _, _, plain = step(make_model, "none")
    assert backward.count("scaled_dot_product") == 2 * LAYERS
    assert backward.count("mm") == plain.count("mm") + 3 * LAYERS  # the last product of a block is not needed


def test_scores_of_attention_written_out_are_not_kept(make_model):
    _, full, _ = step(make_model, "full", "eager")
    _, selective, _ = step(make_model, "selective", "eager")
    assert (selective - full) / LAYERS / WIDTH_BYTES < 9


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_every_other_layer(make_model, mode):
    model = make_model().train()
    model.activation_checkpointing_enable(recompute_kwargs(mode), every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in model.gpt_neox.layers] == [True, False]


def test_selective_compiles_in_one_graph(make_model, tokens):
    model = make_model().train()
    model(tokens(), labels=tokens()).loss.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable(recompute_kwargs("selective"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    torch._dynamo.reset()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_without_recomputation_there_are_no_arguments():
    assert recompute_kwargs("none") is None


def test_full_is_what_transformers_does_by_itself(make_model):
    by_default, ours = make_model(), make_model()
    by_default.activation_checkpointing_enable()
    ours.activation_checkpointing_enable(recompute_kwargs("full"))
    layers = (by_default.gpt_neox.layers[0], ours.gpt_neox.layers[0])
    assert layers[0]._gradient_checkpointing_func.keywords == layers[1]._gradient_checkpointing_func.keywords


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing='half' is unknown; choose one of none, selective"):
        recompute_kwargs("half")


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_the_embedding_stays_with_its_kernel(make_model, mode):
    """transformers' hook on it asks for a gradient that is there; a bf16 sum elsewhere would be rounded once more."""
    gradients = []
    for arguments in (None, recompute_kwargs(mode)):
        model = make_model(kernels="triton", num_hidden_layers=1).bfloat16().train()
        accumulate_gradients_in_fp32(model)
        if arguments is not None:
            model.activation_checkpointing_enable(arguments)
            assert model.gpt_neox.embed_in._forward_hooks
        tokens = torch.arange(8)[None]
        with Watch() as forward:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert forward.count("neox_hf::embedding_gradient") == 1
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_frozen_embedding_hears_what_is_asked_of_it(make_model):
    model = make_model(kernels="triton", num_hidden_layers=1).train()
    model.gpt_neox.embed_in.requires_grad_(False)
    model.enable_input_require_grads()
    assert model.gpt_neox.embed(torch.arange(8)[None]).requires_grad
    model.disable_input_require_grads()
    assert not model.gpt_neox.embed(torch.arange(8)[None]).requires_grad
