"""Dropout of the residual stream, where a kernel joins the branches to it."""

import pytest
import torch
from torch import nn

from neox_hf.modeling.layer import GPTNeoXLayer
from neox_hf.modeling.model import GPTNeoXModel


@pytest.mark.parametrize("parallel", [True, False])
def test_masks_repeat_with_the_seed_and_only_then(parallel, make_config):
    config = make_config(kernels="triton", hidden_dropout=0.5, num_hidden_layers=1, use_parallel_residual=parallel)
    model = GPTNeoXModel(config).train()
    ids = torch.arange(6)[None]
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids, use_cache=False).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(*[model(ids, use_cache=False).last_hidden_state for _ in range(2)])


def test_a_dropout_that_is_watched_is_called(make_config):
    layer = GPTNeoXLayer(make_config(kernels="triton", hidden_dropout=0.5), 0).train()
    heard = []
    layer.post_mlp_dropout.register_forward_hook(lambda module, args, output: heard.append(output))
    angles = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    layer(torch.randn(1, 3, 32), position_embeddings=angles)
    assert len(heard) == 1


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_dropout_has_a_mode_of_its_own(kernels, make_config):
    """As someone wants who measures without dropout in training, or draws several answers from a trained model."""
    model = GPTNeoXModel(make_config(kernels=kernels, hidden_dropout=0.5, num_hidden_layers=1))
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    ids = torch.arange(6)[None]
    wanted = model.eval()(ids, use_cache=False).last_hidden_state
    for dropout in dropouts:
        dropout.train()
    assert not torch.allclose(model(ids, use_cache=False).last_hidden_state, wanted)
    model.train()
    for dropout in dropouts:
        dropout.eval()
    assert torch.equal(model(ids, use_cache=False).last_hidden_state, wanted)
