"""Optimizers in a trainer's hands: one that the user gives, one that has trained before, and numbers of a recipe."""

import pytest
import torch

from neox_hf.errors import RecipeError
from neox_hf.training.optimizers import MasterAdamW
from tests.training.test_trainer_by_hand import losses, make, small_model  # noqa: F401 (make is a fixture)

GIVEN = {
    "a class": lambda made, model: {"optimizer_cls_and_kwargs": (made, {"lr": 1e-2})},
    "an optimizer": lambda made, model: {"optimizers": (made(model.parameters(), lr=1e-2), None)},
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("made", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("given", GIVEN)
def test_one_without_masters_is_refused_where_the_precision_keeps_them(given, made, precision, make):  # noqa: F811
    model = small_model()
    trainer = make(model, trainer=GIVEN[given](made, model), precision=precision)
    message = (
        rf"the optimizer torch\.optim\.\w+\.{made.__name__} has no fp32 master weights, which train.precision="
        f"'{precision}' keeps; use train.optim=adamw_torch_fused or adamw_torch and give no other, or train.precision"
    )
    with pytest.raises(RecipeError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("made", "precision"),
    [(torch.optim.SGD, "fp32"), (torch.optim.AdamW, "pure_bf16"), (torch.optim.AdamW, "amp"), (MasterAdamW, "bf16")],
)
@pytest.mark.parametrize("given", GIVEN)
def test_all_others_train(given, made, precision, make):  # noqa: F811
    model = small_model()
    assert len(losses(make(model, trainer=GIVEN[given](made, model), precision=precision))) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_whole_numbers_are_numbers(optim, precision, make):  # noqa: F811
    whole = {"adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 1, "learning_rate": 1, "weight_decay": 0}
    floats = {name: float(value) for name, value in whole.items()}
    assert losses(make(optim=optim, precision=precision, **whole)) == losses(
        make(optim=optim, precision=precision, **floats)
    )


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_without_clipping_takes_none_from_the_run_before(precision, kernels, make):  # noqa: F811
    """Whose last norm was not finite. Where torch takes the step it clips before it, but reads what is left, too."""
    trainer = make(precision=precision)
    trainer.create_optimizer().kernels = kernels
    trainer.train()
    optimizer = trainer.engine.optimizer
    assert (optimizer.gradient_factor is None) is (kernels == "torch")
    optimizer.gradient_factor, optimizer.skip = torch.tensor(float("nan")), torch.tensor(True)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    assert trainer.engine.optimizer is optimizer
    assert not any(torch.equal(*both) for both in zip(before, trainer.model.parameters(), strict=True))
