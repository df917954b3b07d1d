"""Rows of documents and of padding, and attention within them written out in torch."""

import torch

from neox_hf.kernels import document_attention
from neox_hf.kernels.document_spans import DocumentSpans, spans_of_padding, spans_of_positions
from tests.kernels.attention_cases import run

KINDS = ("documents", "one document", "tokens", "left", "right", "both sides", "holes")


def spans_and_seen(kind: str, batch: int, sequence: int, device: str) -> tuple[DocumentSpans, torch.Tensor]:
    """The spans, and bool [B, S, S] of the pairs that see each other. The last sample is whole."""
    generator = torch.Generator().manual_seed(sequence)
    causal = torch.ones(sequence, sequence, dtype=torch.bool).tril()
    if kind in ("documents", "one document", "tokens"):
        likely = {"documents": 0.03, "one document": 0.0, "tokens": 1.0}[kind]
        begins = torch.rand(batch, sequence, generator=generator) < likely
        begins[-1] = False
        number, place = begins.cumsum(-1), torch.arange(sequence).expand(batch, -1)
        positions = place - torch.where(begins, place, 0).cummax(-1).values
        seen = causal & (number[:, :, None] == number[:, None, :])
        return spans_of_positions(positions.to(device)), seen.to(device)
    kept = torch.ones(batch, sequence, dtype=torch.bool)
    third = max(sequence // 3, 1)
    if kind in ("left", "both sides"):
        kept[:-1, :third] = False
    if kind in ("right", "both sides"):
        kept[:-1, -third:] = False
    if kind == "holes":
        kept[:-1] = torch.rand(batch - 1, sequence, generator=generator) < 0.6
        kept[:-1, :2] = torch.tensor([True, False])[: min(sequence, 2)]
        kept[:-1, -1] = True
    seen = causal & kept[:, None, :]
    return spans_of_padding(kept.to(device)), seen.to(device)


def written_out(seen):
    def attend(query, key, value, scale):
        scores = (scale * query @ key.transpose(-1, -2)).masked_fill(~seen[:, None], -torch.inf)
        return (scores.softmax(-1).nan_to_num(0) @ value).transpose(1, 2)

    return attend


def within(spans, backend="triton"):
    def attend(query, key, value, scale):
        return document_attention(query, key, value, spans, scale=scale, backend=backend)

    return attend


def check(device, dtype, kind, batch, sequence, count, size, tolerance=1.05):
    """Neither the output nor the gradient is further from fp64 than those of the equation written out in `dtype`."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, sequence, count, 3, size, device=device).to(dtype)
    spans, seen = spans_and_seen(kind, batch, sequence, device)
    upstream = torch.randn(batch, sequence, count, size, device=device).to(dtype)
    truth = run(written_out(seen), qkv, upstream, torch.float64)
    reference = run(written_out(seen), qkv, upstream, dtype)
    found = run(within(spans), qkv, upstream, dtype)
    for name, a, b, exact in zip(("output", "gradient"), found, reference, truth, strict=True):
        assert a.isfinite().all(), name
        error, allowed = ((x - exact).norm() / exact.norm() for x in (a, b))
        assert error <= allowed * tolerance + 1e-6, f"{name}: {error:.1e}, torch written out {allowed:.1e}"
