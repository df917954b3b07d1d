"""Selective recomputation by the kernels: gradients stay, and what norms and activations give is not kept."""

import pytest
import torch

from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.recompute import makes_outputs_again, recompute_selectively


def summing(model):
    for parameter in model.parameters():
        sum_in(parameter, SumInGrad())
    return model.train()


def gradients_and_kept(model, ids):
    """Gradients by name, and bytes of what the forward pass has kept."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("parallel", [True, False])
def test_gradients_stay_and_memory_does_not(parallel, make_model, tokens):
    ids = tokens(length=8)
    fields = {"kernels": "triton", "use_parallel_residual": parallel, "hidden_dropout": 0.0}
    whole = gradients_and_kept(summing(make_model(**fields)), ids)
    model = summing(make_model(**fields))
    recompute_selectively(model)
    assert model.gpt_neox.layers[0].mlp.act.makes_again
    assert not model.is_gradient_checkpointing
    selective = gradients_and_kept(model, ids)
    for name, gradient in whole[0].items():
        torch.testing.assert_close(selective[0][name], gradient, rtol=1e-5, atol=1e-7)
    config = model.config
    spared = config.num_hidden_layers * ids.numel() * (2 * config.hidden_size + config.intermediate_size) * 4
    assert whole[1] - selective[1] == spared


def test_without_kernels_torch_computes_again(make_model):
    model = summing(make_model(kernels="torch"))
    recompute_selectively(model)
    assert model.is_gradient_checkpointing
    assert not model.gpt_neox.layers[0].input_layernorm.makes_again


def test_gradients_that_autograd_sums_need_what_it_keeps(make_model):
    model = make_model(kernels="triton")
    assert not makes_outputs_again(model)
    assert makes_outputs_again(summing(model))


def test_a_compiler_gets_torch_s_form(make_model):
    model = summing(make_model(kernels="triton"))
    recompute_selectively(model, compiled=True)
    assert model.is_gradient_checkpointing


def test_a_frozen_embedding_loses_nothing(make_model, tokens):
    """Nothing runs the first norm's backward pass for its input alone."""
    ids = tokens(length=8)
    wanted, found = (summing(make_model(kernels="triton", hidden_dropout=0.0)) for _ in range(2))
    for model in (wanted, found):
        model.gpt_neox.embed_in.requires_grad_(False)
        model.gpt_neox.layers[0].input_layernorm.requires_grad_(False)
        model.gpt_neox.layers[0].post_attention_layernorm.requires_grad_(False)
    recompute_selectively(found)
    gradients = [gradients_and_kept(model, ids)[0] for model in (wanted, found)]
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
