"""A data set that is no stream, over several ranks: each row falls to one of them, once an epoch."""

import tempfile

import pytest
import torch
from torch.utils.data import Dataset

import neox_hf
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.gloo import run_ranks
from tests.modeling.small import SMALL

ROWS = 16


class Numbers(Dataset):
    """Row n holds nothing but n."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((8,), number), "labels": torch.full((8,), number)}


class Notes(NeoXTrainer):
    """Notes which rows it trains on."""

    def training_step(self, model, inputs, *args):
        self.rows.extend(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args)


def rows_of_an_epoch(rank: int, data_seed: int | None, micro_batch: int) -> list[int]:
    values = {"max_steps": 4, "save_strategy": "no", "report_to": [], "precision": "fp32", "data_seed": data_seed}
    with tempfile.TemporaryDirectory() as folder:
        values["per_device_train_batch_size"] = micro_batch
        args = NeoXTrainingArguments(output_dir=folder, use_cpu=True, disable_tqdm=True, **values)
        model = neox_hf.GPTNeoXForCausalLM(neox_hf.GPTNeoXConfig(**SMALL))
        trainer = Notes(model, args, train_dataset=Numbers())
        trainer.rows = []
        trainer.train()
    return trainer.rows


@pytest.mark.parametrize("data_seed", [None, 7])
def test_every_row_once(data_seed):
    """And in each step the rows of one rank with larger batches."""
    first, second = run_ranks(rows_of_an_epoch, 2, data_seed, 2)
    assert sorted(first + second) == list(range(ROWS))
    alone = rows_of_an_epoch(0, data_seed, 4)
    for step in range(4):
        together = first[2 * step : 2 * step + 2] + second[2 * step : 2 * step + 2]
        assert sorted(together) == sorted(alone[4 * step : 4 * step + 4])
