"""`NeoXTrainer` on two replicas in the hands of somebody who knows HF's: as one process with all of the samples."""

import math
import tempfile

import pytest
import torch
from torch.utils.data import Dataset

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.data import DataSettings, SourceSettings, evaluation_batches
from neox_hf.data.tokenization import byte_tokenizer
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.gloo import run_ranks
from tests.modeling.small import SMALL

WORDS = 300
"""Of a model for bytes, and some more."""


class Unequal(Dataset):
    """Rows of twelve words, of which each has labels of its own number."""

    def __init__(self, rows: int = 16) -> None:
        self.ids = torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        kept = torch.arange(12) < 2 + 7 * place % 11
        return {"input_ids": self.ids[place], "labels": self.ids[place].where(kept, -100)}


def make(
    folder: str, samples: int = 4, rows: int = 16, trainer: dict | None = None, kind: type = NeoXTrainer, **given
) -> NeoXTrainer:
    """A trainer whose steps have `samples` over all ranks."""
    values = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": 5}
    values |= {"save_strategy": "no", "peak_tflops": 1.0, "disable_tqdm": True, "max_grad_norm": 0.5, **given}
    arguments = NeoXTrainingArguments(output_dir=folder, use_cpu=True, **values)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = samples // arguments.world_size
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL | {"vocab_size": WORDS}))
    return kind(model, arguments, train_dataset=Unequal(rows), **trainer or {})


def told(trainer: NeoXTrainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


def trained(rank: int, before: str | None, given: dict) -> tuple[list, list]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, **given)
        if before == "evaluate":
            trainer.evaluate(Unequal())
        elif before == "predict":
            trainer.predict(Unequal())
        trainer.train()
        return told(trainer), [parameter.detach().float() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize(
    ("before", "given", "near"),
    [
        ("evaluate", {"precision": "fp32"}, 1e-4),
        ("predict", {"precision": "pure_bf16"}, 0.05),
        (None, {"precision": "bf16", "label_smoothing_factor": 0.1}, 0.02),
        (None, {"precision": "bf16", "max_grad_norm": 0.0}, 0.02),
    ],
    ids=str,
)
def test_the_steps_of_one_process(before, given, near):
    (alone,) = run_ranks(trained, 1, before, given)
    first, second = run_ranks(trained, 2, before, given)
    assert all(map(torch.equal, first[1], second[1]))
    assert first[0] == second[0]
    assert torch.tensor(first[0]).sub(torch.tensor(alone[0])).abs().max() < near


def evaluated(rank: int, corpus: str) -> tuple[list[float], list[int]]:
    """Losses of evaluations at the end of an epoch that has a remainder, and how many rows metrics are given."""
    rows = []

    def count(found) -> dict:
        rows.append(found.predictions.shape[0])
        return {}

    with tempfile.TemporaryDirectory() as folder:
        epoch = {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch", "learning_rate": 0.0}
        others = {"compute_metrics": count, "eval_dataset": Unequal()}  # until it is known who reads what
        trainer = make(folder, rows=10, precision="fp32", trainer=others, **epoch)
        topology, size = trainer.topology, trainer.args.per_device_eval_batch_size
        sources = [SourceSettings(path=corpus, sample_by="line")]
        held_out = {"eval_fraction": 0.5, "eval_samples": 16, "eod_mask_loss": True}
        settings = DataSettings(sources=sources, seq_length=16, streams=4, **held_out)
        place = {"data_rank": topology.data_rank, "data_size": topology.data, "vocab_size": WORDS}
        trainer.eval_dataset = evaluation_batches(settings, byte_tokenizer(), batch_size=size, **place)
        trainer.train()
        trainer.evaluate()
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry], rows


def test_an_evaluation_knows_nothing_of_what_training_has_left_over(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join("ab" * (1 + n % 9) for n in range(200)))
    both = [run_ranks(evaluated, size, str(tmp_path)) for size in (1, 2)]
    for losses, rows in (answer for answers in both for answer in answers):
        assert losses == pytest.approx(both[0][0][0], abs=1e-5)
        assert rows == [16, 16]


class Poisoned(NeoXTrainer):
    def training_step(self, *given):
        loss = super().training_step(*given)
        if self.args.process_index == 1:
            self.model.gpt_neox.final_layer_norm.weight.grad[-1] = math.nan
        return loss


def not_a_number(rank: int) -> list[bool]:
    """In the part that one replica steps, where the other does not see it."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"precision": "bf16", "max_grad_norm": 0.0, "nan_policy": "skip"}
        trainer = make(folder, kind=Poisoned, **given)
        start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        return [torch.equal(*pair) for pair in zip(start, trainer.model.parameters(), strict=True)]


def test_a_step_that_is_not_clipped_is_skipped_by_all():
    assert all(map(all, run_ranks(not_a_number, 2)))
