"""An evaluation in which every label weighs the same, whichever batches and ranks the labels fall to."""

import torch
import torch.distributed as dist
from torch import Tensor

from neox_hf.data import EvaluationBatches
from neox_hf.kernels import IGNORE_INDEX
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments

NUM_ITEMS = "num_items_in_batch"


class WeighedBatches(EvaluationBatches):
    """The same batches, each with NUM_ITEMS: how many labels the batches of all ranks have at a time, in the mean.

    HF divides the sum of a batch's losses by it and takes the mean over batches and ranks: with one divisor for all
    that is the mean over all labels.
    """

    def __init__(self, batches: EvaluationBatches, topology: Topology, args: NeoXTrainingArguments) -> None:
        self.__dict__.update(batches.__dict__)
        labels = torch.tensor(sum(int(count_labels(batch)) for batch in batches), device=args.device)
        if topology.data > 1:
            dist.all_reduce(labels, group=topology.groups.data)
        # HF multiplies by the ranks again, unless it is told that each averages over its own labels.
        ranks = 1 if args.average_tokens_across_devices else topology.data
        self._labels = labels.double() / (len(batches) * ranks)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return super().__getitem__(number) | {NUM_ITEMS: self._labels}


def count_labels(batch: dict[str, Tensor]) -> Tensor:
    """Labels of a batch, scalar."""
    return (batch["shift_labels"] != IGNORE_INDEX).sum()
