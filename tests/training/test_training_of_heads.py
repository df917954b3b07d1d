"""Classification and question answering under HF's Trainer and ours: a step is the same, however it is cut up."""

import tempfile

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import neox_hf
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.gloo import run_ranks
from tests.modeling.small import SMALL

ROWS, LENGTH, CLASSES, PAD = 4, 16, 3, 0
HEADS = ["GPTNeoXForSequenceClassification", "GPTNeoXForTokenClassification", "GPTNeoXForQuestionAnswering"]
TRAINERS = [(Trainer, TrainingArguments, {}), (NeoXTrainer, NeoXTrainingArguments, {"precision": "fp32"})]


class Examples(Dataset):
    """As many rows as one step takes; the tokens of each next one have more labels."""

    def __init__(self, head: str) -> None:
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, SMALL["vocab_size"], (ROWS, LENGTH), generator=draw)
        self.rows = [{"input_ids": row, **self.answers(head, n, row % CLASSES)} for n, row in enumerate(tokens)]

    @staticmethod
    def answers(head: str, number: int, classes: torch.Tensor) -> dict[str, torch.Tensor]:
        if head.endswith("QuestionAnswering"):
            return {"start_positions": torch.tensor(number), "end_positions": torch.tensor(number + 3)}
        if head.endswith("SequenceClassification"):
            return {"labels": classes[0]}
        return {"labels": torch.where(torch.arange(LENGTH) < 4 * number + 2, classes, -100)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return dict(self.rows[number])


def make_model(head: str) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {"num_labels": CLASSES, "pad_token_id": PAD, "classifier_dropout": 0.0, "initializer_range": 0.2}
    return getattr(neox_hf, head)(neox_hf.GPTNeoXConfig(**SMALL, **fields))


def first_step(rank: int, head: str, which: int, rows: int, micro_batches: int) -> tuple[float, float]:
    """Loss and gradient norm of one step; this is one of several ranks, or alone."""
    trainer_class, arguments, values = TRAINERS[which]
    values = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [], "data_seed": 0, **values}
    values |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(output_dir=folder, use_cpu=True, disable_tqdm=True, **values)
        trainer = trainer_class(make_model(head), args, train_dataset=Examples(head))
        trainer.train()
    return trainer.state.log_history[0]["loss"], float(trainer.state.log_history[0]["grad_norm"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("which", [0, 1], ids=["HF's", "ours"])
def test_micro_batches_are_one_batch(head, which):
    whole = first_step(0, head, which, ROWS, 1)
    assert whole[0] == pytest.approx(loss_by_hand(head), rel=1e-3)  # HF logs so many digits
    assert first_step(0, head, which, ROWS // 2, 2) == pytest.approx(whole, rel=1e-4)
    assert first_step(0, head, which, 1, ROWS) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_replicas_are_one_batch(head):
    whole = first_step(0, head, 1, ROWS, 1)
    for found in run_ranks(first_step, 2, head, 1, 1, 2):
        assert found == pytest.approx(whole, rel=1e-4)


def loss_by_hand(head: str) -> float:
    """Of all rows at once."""
    examples = Examples(head)
    rows = [examples[number] for number in range(ROWS)]
    with torch.no_grad():
        return float(make_model(head)(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss)
