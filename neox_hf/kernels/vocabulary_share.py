"""The softmax over a vocabulary whose rows of the head may be dealt out to several ranks.

    lse = log sum_v exp z_v        loss = lse - z_y + c lse^2
    dloss/dz_v = p_v (1 + 2 c lse) - [v = y]        p_v = exp(z_v - lse)

for logits z [C tokens, V], label y, and the weight c of the z-loss (0: none), which draws lse to 0.
Where the vocabulary is split, each rank normalises over its own rows, and two small reductions make that the softmax
over all rows (Shoeybi et al., 2019, arXiv 1909.08053, section 3); logits never travel.
z-loss: Chowdhery et al., 2022, arXiv 2204.02311, section 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Reduce = Callable[[Tensor], Any]


@dataclass(frozen=True)
class VocabularyShare:
    """Which words this rank's rows of the head stand for, and how it asks the other ranks about theirs.

    first_row: word of its first row. rows: how many rows are words; those after them are padding.
    all_max, all_sum: reduce a tensor over the ranks in place; None where this rank holds the whole vocabulary.
    """

    first_row: int
    rows: int
    all_max: Reduce | None = None
    all_sum: Reduce | None = None

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Column [C] of each label among this rank's rows, and whether it has one [C]; column 0 where it has not."""
        column = labels - self.first_row
        held = (column >= 0) & (column < self.rows)
        return column.where(held, 0), held


@dataclass(frozen=True)
class Normalised:
    """Log-probabilities of this rank's words [C, V] over all ranks' words, lse [C], losses without z-loss [C]."""

    log_probabilities: Tensor
    lse: Tensor
    losses: Tensor


def log_softmax_over_ranks(logits: Tensor, labels: Tensor, share: VocabularyShare) -> Normalised:
    """Statistics are at least fp32. Overwrites the padding's logits. The loss of a label that no rank holds is NaN."""
    # Finite, so that a rank without any real row still has a softmax; its weight among the ranks is exp(-huge) = 0.
    logits[:, share.rows :] = torch.finfo(logits.dtype).min
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=precise)
    column, held = share.locate(labels)
    logit = logits.gather(1, column[:, None]).to(precise)
    if share.all_max is None:
        at_label = log_probabilities.gather(1, column[:, None])
        lse = (logit - at_label).squeeze(1)
        return Normalised(log_probabilities, lse, -at_label.squeeze(1).where(held, math.nan))

    largest, place = logits.max(dim=-1, keepdim=True)
    own = largest.to(precise) - log_probabilities.gather(1, place)  # log-sum-exp over this rank's words [C, 1]
    highest = own.clone()
    share.all_max(highest)
    sums = torch.cat(((own - highest).exp(), logit.where(held[:, None], 0), held[:, None].to(precise)), dim=1)
    share.all_sum(sums)
    total, label_logit, holders = sums.unbind(dim=1)
    lse = highest.squeeze(1) + total.log()
    log_probabilities += own - lse[:, None]
    return Normalised(log_probabilities, lse, (lse - label_logit).where(holders > 0, math.nan))


def logits_gradient(normalised: Normalised, labels: Tensor, share: VocabularyShare, z_loss: float, out: Tensor) -> None:
    """Gradient [C, V] in the logits, into `out`. Uses up the log-probabilities.

    One-hot is subtracted before rounding: a probability near one would lose the rest.
    """
    column, held = share.locate(labels)
    probabilities = normalised.log_probabilities
    at_label = probabilities.gather(1, column[:, None])
    at_label = torch.where(held[:, None], at_label.expm1(), at_label.exp())
    if z_loss:
        excess = 2 * z_loss * normalised.lse[:, None]
        at_label += probabilities.gather(1, column[:, None]).exp() * excess
        torch.mul(probabilities.exp_(), 1 + excess, out=out)
    else:
        torch.exp(probabilities, out=out)
    out.scatter_(1, column[:, None], at_label.to(out.dtype))
