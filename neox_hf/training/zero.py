"""ZeRO 1 to 3 without tensor or pipeline parallelism: HF's own step over DeepSpeed's engine.

DeepSpeed shards the optimizer's state (1), gradients too (2) and weights too (3) over the data-parallel ranks, keeps
the fp32 master weights, clips, and leaves a step out whose gradients are not finite. At stage 3 a parameter's tensor is
empty outside its layer's turn; no rank holds the model whole, from its first weights on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from neox_hf.kernels.weight_gradient import sum_in
from neox_hf.modeling.fresh_weights import draw_weights
from neox_hf.modeling.model import GPTNeoXPreTrainedModel
from neox_hf.training.deepspeed_optimizer import DeepSpeedOptimizer
from neox_hf.training.engine import NativeEngine

if TYPE_CHECKING:
    from neox_hf.training.trainer import NeoXTrainer


class ZeroEngine(DeepSpeedOptimizer, NativeEngine):
    """The stock step and loop, where `accelerator.prepare` wraps the model in DeepSpeed's engine."""

    def __init__(self, trainer: "NeoXTrainer") -> None:
        super().__init__(trainer)
        self.stage: int = trainer.args.deepspeed["zero_optimization"]["stage"]

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model itself, for Accelerate to wrap: in a second `train()`, too, at whose start it has taken the first
        one's engine apart, with which HF would go on."""
        self.take_accumulation()
        trainer = self.trainer
        if isinstance(model, deepspeed.DeepSpeedEngine):
            _let_go(model)
        trainer.model_wrapped, trainer.deepspeed = trainer.model, None
        return trainer.model

    def evaluate(self, batches, **loop: object) -> EvalLoopOutput:
        if self.trainer.deepspeed is not None:
            return super().evaluate(batches, **loop)
        with self._without_deepspeed():
            return super().evaluate(batches, **loop)

    @contextmanager
    def _without_deepspeed(self) -> Iterator[None]:
        """Evaluate before training, when there is no engine yet: HF would make one for inference, which cannot train.

        At stage 3 the weights are put together for as long as it takes.
        """
        trainer = self.trainer
        parts = list(trainer.model.parameters()) if self.stage == 3 else []
        trainer.is_deepspeed_enabled = False
        try:
            with deepspeed.zero.GatheredParameters(parts):
                yield
        finally:
            trainer.is_deepspeed_enabled = True
            trainer.accelerator._models.clear()


def _let_go(engine: deepspeed.DeepSpeedEngine) -> None:
    """Have the model hold on to nothing of `engine`, whose gradients and optimizer would stay in memory with it."""
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    for parameter in engine.module.parameters():
        sum_in(parameter, None)


def draw_partitioned(
    model: GPTNeoXPreTrainedModel, seed: int, device: torch.device | str, config: dict[str, Any]
) -> None:
    """First weights at stage 3: `draw_weights` for one module after the other, each then cut up among the ranks.

    No rank ever holds more than its parts and one whole module.

    Args:
        model: on `meta`. config: DeepSpeed's configuration.
    """
    dtype = next(model.parameters()).dtype
    for name in [name for name, module in model.named_modules() if [*module.parameters(recurse=False)]]:
        module = model.get_submodule(name)
        if all(is_zero_param(parameter) for parameter in module.parameters(recurse=False)):
            continue  # a tied head, cut up with the embedding
        draw_weights(model, seed, device, [module])
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    draw_weights(model, seed, device, [module for module in model.modules() if not [*module.parameters()]])
