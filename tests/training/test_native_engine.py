"""What the native engine tells the model of a step."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.training.engine import NativeEngine
from neox_hf.training.optimizers import MasterAdamW
from tests.modeling.small import SMALL


class StandIn:
    """A trainer of three processes, as far as `step` asks it."""

    topology = None
    label_smoother = compute_loss_func = None
    compute_loss = Trainer.compute_loss

    def __init__(self, device):
        self.model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))
        self.args = SimpleNamespace(device=torch.device(device))
        self.accelerator = SimpleNamespace(num_processes=3, unwrap_model=lambda model: model)


@pytest.fixture
def given(monkeypatch):
    """What HF's step is given for the model."""
    given = {}
    monkeypatch.setattr(Trainer, "training_step", lambda trainer, model, batch, num_items: given.update(batch))
    return given


@pytest.mark.parametrize(
    ("device", "num_items", "told"),
    [
        ("cuda", torch.tensor(64), {"skip_logits": True, "loss_factor": 3}),
        ("cuda", None, {"skip_logits": True, "loss_factor": 1}),
        ("cpu", torch.tensor(64), {}),
    ],
)
def test_the_factor_that_hf_multiplies_the_loss_by(device, num_items, told, given):
    NativeEngine(StandIn(device)).step(None, {"input_ids": None}, num_items)
    assert given == {"input_ids": None, **told}


def test_who_reads_logits_is_given_them(given):
    trainer = StandIn("cuda")
    trainer.label_smoother = object()
    NativeEngine(trainer).step(None, {}, torch.tensor(64))
    assert given == {}


@pytest.mark.parametrize("made", ["by torch", "ours, which has stepped"])
def test_who_steps_everything_on_every_replica(made):
    trainer = StandIn("cpu")
    parameters = list(trainer.model.parameters())
    trainer.optimizer = torch.optim.SGD(parameters) if made == "by torch" else MasterAdamW(parameters)
    parameters[0].grad = torch.zeros_like(parameters[0])
    trainer.optimizer.step()
    assert NativeEngine(trainer)._step_in_parts() is None
    assert all(p is q for p, q in zip(trainer.optimizer.param_groups[0]["params"], parameters, strict=True))
