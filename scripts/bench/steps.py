"""Our training step, through `NeoXTrainer`."""

import gc
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from neox_hf.kernels import attention, fused_product, product
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from scripts.bench.floors import PRODUCTS
from scripts.bench.sizes import Size
from scripts.bench.turns import TurnClock, TurnLength
from scripts.bench.variants import Variant

ENDLESS = 10**6


class Ours:
    """One variant; each turn is a run of its own, of which nothing stays but compiled kernels."""

    def __init__(self, size: Size, variant: Variant, device: torch.device) -> None:
        self.size, self.variant, self.device = size, variant, device

    def turn(self, length: TurnLength) -> dict[str, Any]:
        clock = TurnClock(length)
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(folder, clock)
            trainer.train()
            loss = trainer.state.log_history[-2]["loss"]  # the last entry sums up the run
            trainer.accelerator.free_memory()
        result = clock.result(loss)
        del trainer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def _trainer(self, folder: str, clock: TurnClock) -> NeoXTrainer:
        config = self.size.config()
        config.init_method = config.output_layer_init_method = "normal"  # as the peers start, for losses to compare
        config.kernels = "torch" if "torch" in self.variant.switches else "auto"
        if "sdpa" in self.variant.switches:
            without_flash_attention_4()
        if "cublas" in self.variant.switches:
            without_choosing_products()
        if "apart" in self.variant.switches:
            without_fused_products()
        with self.device:
            model = GPTNeoXForCausalLM(config)
        arguments = self._arguments(folder)
        trainer = OneBatchTrainer(model, arguments, topology=Topology.single(), callbacks=[EndOfTurn(clock)])
        trainer.batch = one_batch(self.size, self.device)
        return trainer

    def _arguments(self, folder: str) -> NeoXTrainingArguments:
        recompute = next((switch for switch in self.variant.switches if switch in ("selective", "full")), "none")
        return NeoXTrainingArguments(
            output_dir=folder,
            precision=self.variant.precision,
            activation_checkpointing=recompute,
            torch_compile="compiled" in self.variant.switches,
            cuda_graphs=True if "graphs" in self.variant.switches else "auto",
            max_steps=ENDLESS,
            per_device_train_batch_size=self.size.micro_batch,
            learning_rate=1e-4,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_schedule="none",
            peak_tflops=PRODUCTS / 1e12,  # given, for measuring it would load the device
            disable_tqdm=True,
            use_cpu=self.device.type == "cpu",
        )


def without_flash_attention_4() -> None:
    """For the rest of this process, which measures one variant."""
    attention.has_flash_attention_4 = lambda: False


def without_choosing_products() -> None:
    """Likewise."""
    product.choices_on = lambda device: None
    without_fused_products()


def without_fused_products() -> None:
    """Likewise."""
    fused_product.fused_choices_on = lambda device: None


class OneBatchTrainer(NeoXTrainer):
    """Sees one batch again and again, as the peers do."""

    batch: dict[str, Tensor]

    def get_train_dataloader(self) -> Iterator[dict[str, Tensor]]:
        return itertools.repeat(self.batch)


def one_batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    """Random tokens on the device, with the names that a stream gives."""
    shape = (size.micro_batch, size.sequence + 1)
    tokens = torch.randint(size.config().vocab_size, shape, device=device)
    inputs, following = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return {"input_ids": inputs, "labels": inputs, "shift_labels": following}


class EndOfTurn(TrainerCallback):
    """Ends training when the clock says so, with a last line in the log."""

    def __init__(self, clock: TurnClock) -> None:
        self.clock = clock

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock.is_over_after_step():
            control.should_training_stop = control.should_log = True
