"""Tokens/s of `NeoXTrainer` beside its peers, on one recipe's model, batch and stream, interleaved in one run.

    python scripts/bench_trainer.py --config recipes/pythia_160m.yaml --against stock-amp stock-bf16 --accumulation 4
    python scripts/bench_trainer.py --config recipes/demo.yaml --against bare

Variants: `neox` (always measured); `neox-repeating`, the same without its stream; `bare`, a hand-written loop over
the same model class and stream; `stock-amp` and `stock-bf16`, transformers' own Trainer on transformers' own class
with fp32 weights under autocast, or with bf16 weights and bf16 optimizer states. Each round measures every variant
once; the table has medians over the rounds.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockForCausalLM

from neox_hf.data import StreamLoader, TokenStream, build_tokenizer
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.settings import model_config
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.recipe import Recipe, load_recipe
from neox_hf.training.trainer import NeoXTrainer


class StepClock(TrainerCallback):
    """Seconds between the end of the warm-up and the end of the last step, the device's queue emptied at both."""

    def __init__(self, warmup: int, last: int) -> None:
        self.warmup, self.last = warmup, last
        self.begin = self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warmup, self.last):
            synchronise()
            now = time.perf_counter()
            self.seconds, self.begin = now - self.begin, now


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """What all variants share: recipe, tokenizer, batch geometry."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace, folder: Path) -> None:
        self.recipe, self.options, self.folder = recipe, options, folder
        self.tokenizer = build_tokenizer(recipe.tokenizer, recipe.data, folder / "tokenizer")
        self.config = model_config(recipe.model, tokens=len(self.tokenizer), seq_length=recipe.data.seq_length)
        self.micro_batch = recipe.train.per_device_train_batch_size
        self.steps = options.warmup + options.steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def measured_tokens(self) -> int:
        return self.options.steps * self.options.accumulation * self.micro_batch * self.recipe.data.seq_length

    def stream(self) -> TokenStream:
        return TokenStream(self.recipe.data, self.tokenizer, split="train", vocab_size=self.config.vocab_size)

    def loader(self) -> StreamLoader:
        return StreamLoader(
            self.stream(),
            batch_size=self.micro_batch,
            workers=self.recipe.data.workers,
            pin_memory=self.device.type == "cuda",
        )

    def arguments(self, cls: type[TrainingArguments], **changes) -> TrainingArguments:
        return cls(
            output_dir=str(self.folder / "out"),
            max_steps=self.steps,
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.options.accumulation,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=self.device.type == "cpu",
            **changes,
        )

    def clock(self) -> StepClock:
        return StepClock(self.options.warmup, self.steps)


def run_neox(bench: Bench, trainer_class: type[NeoXTrainer] = NeoXTrainer) -> float:
    clock = bench.clock()
    with bench.device:
        model = GPTNeoXForCausalLM(bench.config)
    trainer = trainer_class(
        model,
        bench.arguments(NeoXTrainingArguments),
        topology=Topology.single(),
        train_dataset=bench.stream(),
        workers=bench.recipe.data.workers,
        callbacks=[clock],
    )
    trainer.train()
    trainer.loader.close()
    return clock.seconds


class RepeatingTrainer(NeoXTrainer):
    """Sees the stream's first batch again and again: what the stream costs is the difference to `NeoXTrainer`."""

    def get_train_dataloader(self):
        return itertools.repeat(next(iter(super().get_train_dataloader())))


def run_stock(bench: Bench, dtype: torch.dtype) -> float:
    clock = bench.clock()
    with bench.device:
        model = StockForCausalLM(bench.config).to(dtype)
    loader = bench.loader()
    amp = dtype == torch.float32 and bench.device.type == "cuda"
    trainer = StreamTrainer(model, bench.arguments(TrainingArguments, bf16=amp), callbacks=[clock])
    trainer.loader = loader
    trainer.train()
    loader.close()
    return clock.seconds


class StreamTrainer(Trainer):
    """Stock in all but where its batches come from, which is the same for every variant."""

    def get_train_dataloader(self):
        return self.loader


def run_bare(bench: Bench) -> float:
    """fp32 on the CPU; the loop anyone would write, token-weighted like the trainers'."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(bench.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = bench.loader()
    batches = iter(loader)
    begin = 0.0
    for step in range(bench.steps):
        if step == bench.options.warmup:
            begin = time.perf_counter()
        micro_batches = list(itertools.islice(batches, bench.options.accumulation))
        labels = sum(int((batch["shift_labels"] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            model(**batch, num_items_in_batch=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    loader.close()
    return seconds


VARIANTS: dict[str, Callable[[Bench], float]] = {
    "neox": run_neox,
    "neox-repeating": lambda bench: run_neox(bench, RepeatingTrainer),
    "bare": run_bare,
    "stock-amp": lambda bench: run_stock(bench, torch.float32),
    "stock-bf16": lambda bench: run_stock(bench, torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--against", nargs="+", default=["bare"], choices=sorted(set(VARIANTS) - {"neox"}))
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load_recipe(options.config), options, Path(folder))
        rates = measure(bench, ["neox", *options.against])
    report(rates, options.json)


def measure(bench: Bench, names: list[str]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(bench.options.rounds):
        # Every other round runs backwards, so that no variant always follows the same one.
        for name in names if round_ % 2 == 0 else names[::-1]:
            rates[name].append(bench.measured_tokens / VARIANTS[name](bench))
            print(f"round {round_ + 1}: {name} {rates[name][-1]:,.0f} tokens/s", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return rates


def report(rates: dict[str, list[float]], path: Path | None) -> None:
    ours = statistics.median(rates["neox"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}; medians of {len(rates['neox'])} rounds\n| variant | tokens/s | neox / variant |\n|---|---|---|")
    for name, figures in rates.items():
        median = statistics.median(figures)
        print(f"| {name} | {median:,.0f} | {ours / median:.3f} |")
    if path is not None:
        path.write_text(json.dumps({"device": device, "tokens_per_second": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
