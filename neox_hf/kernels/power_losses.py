"""Head and loss, where the product that makes the logits goes on to powers: no pass over the logits of a chunk is left.

    E_v = 2^(z_v log2(e) - r)        r = ceil(z_y log2(e))        S = sum_v E_v        lse = ln 2 (r + log2 S)
    p_v = E_v / S        dloss/dz_v = a E_v - [v = y]        a = (1 + 2 c lse) / S

for logits z [V] of one token, its label y, and the weight c of the z-loss. z = hidden weight^T, summed in fp32, is
never written. In its place is E, in bf16, which has the range of fp32: powers need not be below 1. So r may come from
the label's logit alone, which is known before the product, and the product sums S as well (`fused_product.py`). What is
left to the gradients is one number a token, a, and the label's own part, g = a E_y - 1:

    dhidden = a (E weight) + g weight_y        dweight = E^T (a hidden) + sum over tokens with label v of g hidden

with E_y = 0 from here on. The label's part is most of the gradient; in E, and with a hidden, it would be rounded
twice. Where S is above 2^96, which a loss of 66 makes it, powers are made again with the largest logit as r
(`power_rows.py`).

Shapes and results are those of `chunked_losses.py`. For bf16, a whole vocabulary of a multiple of 128 or 192 words, and
where there are such products and they are quicker.
"""

import functools

import torch
from torch import Tensor

from neox_hf.kernels.chunked_losses import (
    CHUNK_MULTIPLE,
    Job,
    Result,
    chunked_losses_kernel,
    chunks_of,
    empty_gradient,
    sum_of_products,
)
from neox_hf.kernels.embedding import embedding_gradient_
from neox_hf.kernels.fused_product import TILES, FusedProduct, Tile, epilogues, fused_tile
from neox_hf.kernels.power_rows import add_labels_, finish_rows, per_token
from neox_hf.kernels.product import is_chosen, product_
from neox_hf.kernels.softmax_rows import losses_and_gradient_, sum_of_losses
from neox_hf.kernels.weight_gradient import add_product_

POWER_TILES = ("192x128 1x2", "128x192 1x2", "128x192 2x1")
"""Those that were quickest, of which the columns have to divide the vocabulary: beyond its end there are no powers."""

ROWS_COMPARED = 16
"""Of which gradients are compared, where a tile is chosen."""


class PowerLosses:
    """The losses of tokens hidden [N, H], chunk by chunk, with products of one tile."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor | None, job: Job) -> None:
        self.hidden, self.weight, self.factor, self.job = hidden, weight, factor, job
        self.tokens = per_token(hidden, weight, labels, job)

    def powers(self, part: slice, room: Tensor, tile: Tile, scaled: Tensor | None) -> Tensor:
        """E [C, V] of a chunk, in `room`; its losses, and into `scaled` [C, H], where given, a x."""
        x, tokens = self.hidden[part], self.tokens.of(part)
        powers = room[: x.shape[0]]
        sums = powers.new_empty(x.shape[0], powers.shape[1] // tile.columns, dtype=torch.float32)
        arguments = {"reference": tokens.references[None], "total": sums}
        epilogues().powers.gemm(x, self.weight, powers, epi_args=arguments, **tile.arguments)
        finish_rows(powers, sums, x, self.weight, tokens, scaled, self.job, self.factor)
        return powers

    def all(self, into: Tensor | None, tile: Tile) -> Result:
        """`Result` of all chunks."""
        hidden, weight, wanted = self.hidden, self.weight, self.job.wanted
        for_hidden = empty_gradient(hidden, self.factor) if wanted[0] else None
        for_weight = sum_of_products(weight, into, hidden.shape[0]) if wanted[1] else None
        room = hidden.new_empty(min(self.job.chunk, hidden.shape[0]), weight.shape[0])
        # A chunk's a hidden may lie where hidden's gradient comes to lie, if that is as wide.
        lies_there = for_hidden is not None and for_hidden.dtype == hidden.dtype
        for part in chunks_of(hidden.shape[0], self.job.chunk):
            scaled = None
            if for_weight is not None:
                scaled = for_hidden[part] if lies_there else torch.empty_like(hidden[part])
            powers = self.powers(part, room, tile, scaled)
            if for_weight is not None:
                add_product_(for_weight, powers, scaled, keep=into is not None or part.start > 0)
            if for_hidden is not None:
                self._hidden_gradient(powers, part, for_hidden[part])
        if for_weight is not None:
            words = self.tokens.labels - self.job.share.first_row
            embedding_gradient_(for_weight, words, hidden, True, self.tokens.own)
        return sum_of_losses(self.tokens.losses), for_hidden, for_weight

    def _hidden_gradient(self, powers: Tensor, part: slice, out: Tensor) -> None:
        add_labels_(product_(out, powers, self.weight), self.weight, self.tokens.of(part), self.job)

    def logits_gradient(self, powers: Tensor, rows: int) -> Tensor:
        """The gradient [rows, V] in the logits of the first tokens, which is put together for comparisons alone."""
        tokens = self.tokens.of(slice(rows))
        words = tokens.labels - self.job.share.first_row
        inside = (words >= 0) & (words < powers.shape[1])
        gradient = powers[:rows] * tokens.shares[:, None]
        return gradient.scatter_add_(1, words.where(inside, 0)[:, None], tokens.own.where(inside, 0)[:, None])


def kernel_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor | None, into: Tensor | None, job: Job
) -> Result:
    """`chunked_losses` in Triton, with powers where those are quicker."""
    tile = power_tile(hidden, weight, labels, factor, job)
    if tile is None:
        return chunked_losses_kernel(hidden, weight, labels, factor, into, job)
    return PowerLosses(hidden, weight, labels, factor, job).all(into, tile)


def power_tile(hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor | None, job: Job) -> Tile | None:
    """The tile that `PowerLosses` are to have, or None where `chunked_losses_kernel` is quicker, or the only way."""
    words, (x, known) = weight.shape[0], (each[: job.chunk] for each in (hidden, labels))
    tiles = tuple(text for text in POWER_TILES if words % TILES[text].columns == 0)
    if not tiles or not _suits(x, weight, job):
        return None

    @functools.cache
    def rehearsal() -> tuple[PowerLosses, Tensor]:
        wanted = job._replace(wanted=(True, True))
        return PowerLosses(x, weight, known, factor, wanted), x.new_empty(x.shape[0], words)

    def apart() -> tuple[Tensor, Tensor]:
        trial, room = rehearsal()
        logits, losses = product_(room, x, weight.t()), torch.empty_like(trial.tokens.losses)
        place = {"first_word": job.share.first_row, "ignore_index": job.ignore_index, "words": words}
        losses_and_gradient_(logits, known, losses, **place, z_loss=job.z_loss, factor=factor)
        return losses, logits[:ROWS_COMPARED].clone()

    def fused(tile: Tile) -> tuple[Tensor, Tensor]:
        trial, room = rehearsal()
        powers = trial.powers(slice(None), room, tile, torch.empty_like(x))
        return trial.tokens.losses.clone(), trial.logits_gradient(powers, ROWS_COMPARED)

    product = FusedProduct("product, powers of logits", tiles)
    return fused_tile(product, (x, weight), (*x.shape, words), apart, fused)


def _suits(x: Tensor, weight: Tensor, job: Job) -> bool:
    """Whether a chunk x [C, H] and the whole head are what these products and kernels take."""
    whole = job.share.all_max is None and job.share.rows == weight.shape[0]
    lies_well = x.is_contiguous() and weight.is_contiguous() and job.chunk % CHUNK_MULTIPLE == 0
    return whole and lies_well and weight.dtype == torch.bfloat16 and is_chosen("auto", x, weight.t())
