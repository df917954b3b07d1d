"""Which keys a token sees: spans of documents and of rows with padding."""

import pytest
import torch

from neox_hf.kernels.document_spans import spans_of_padding, spans_of_positions
from tests.kernels.document_cases import KINDS, spans_and_seen


def seen_through(spans, length):
    place = torch.arange(length)
    by_first = (place >= spans.first[..., None]) & (place < spans.behind[..., None])
    by_end = (place >= place[:, None]) & (place < spans.end[..., None])
    assert torch.equal(by_first, by_end.transpose(1, 2)), "queries and keys disagree"
    return by_first if spans.kept is None else by_first & spans.kept[:, None, :]


@pytest.mark.parametrize("length", [1, 2, 7, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_token_sees(kind, length):
    spans, seen = spans_and_seen(kind, 3, length, "cpu")
    if spans is None:
        assert kind in ("holes", "left", "right", "both sides")
        assert seen[0].any(-1).all()
        return
    assert torch.equal(seen_through(spans, length), seen)
    assert spans.first.dtype == spans.behind.dtype == spans.end.dtype == torch.int32
    assert (spans.first.diff(dim=-1) >= 0).all()
    assert (spans.behind.diff(dim=-1) >= 0).all()


def test_rows_of_no_tokens():
    for spans in (
        spans_of_positions(torch.zeros(2, 0).long()),
        spans_of_padding(torch.ones(2, 0).bool(), may_wait=False),
    ):
        assert {places.shape for places in spans if places is not None} == {(2, 0)}


def test_documents_begin_where_positions_do_not_go_on():
    spans = spans_of_positions(torch.tensor([[5, 6, 7, 0, 1, 0], [0, 1, 2, 3, 4, 5]]))
    assert spans.first.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6]
    assert spans.end.tolist() == [[3, 3, 3, 5, 5, 6], [6] * 6]
    assert spans.kept is None


def test_padding_outside_is_outside_of_spans():
    spans = spans_of_padding(torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool())
    assert spans.first.tolist() == [[2] * 5, [0] * 5]
    assert spans.behind.tolist() == [[1, 2, 3, 4, 4], [1, 2, 3, 4, 5]]
    assert spans.end.tolist() == [[0, 1, 5, 5, 4], [5] * 5]
    assert spans.kept is None


def test_padding_between_tokens_is_passed_over():
    kept = torch.tensor([[0, 1, 0, 1, 1]]).bool()
    spans = spans_of_padding(kept)
    assert spans.first.tolist() == [[1] * 5]
    assert torch.equal(spans.kept, kept)


def test_no_padding_is_no_spans():
    assert spans_of_padding(torch.ones(2, 5, dtype=torch.bool)) is None
    assert spans_of_padding(torch.ones(2, 5, dtype=torch.bool), may_wait=False).kept.all()


def test_they_lie_as_kernels_read_them():
    kept = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool().t().contiguous().t()
    assert not kept.is_contiguous()
    assert all(places.is_contiguous() for places in spans_of_padding(kept))
    positions = torch.arange(5)[None].expand(3, -1)
    assert all(places.is_contiguous() for places in spans_of_positions(positions)[:3])


def test_nothing_but_padding():
    spans = spans_of_padding(torch.zeros(1, 3, dtype=torch.bool))
    assert spans.first.tolist() == [[3, 3, 3]]
    assert spans.end.tolist() == [[0, 1, 2]]


def test_where_nobody_may_wait_no_value_is_read():
    kept = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    compiled = torch.compile(lambda x: spans_of_padding(x, may_wait=False), fullgraph=True, backend="aot_eager")
    spans, wanted = compiled(kept), spans_of_padding(kept)
    assert torch.equal(spans.first, wanted.first)
    assert torch.equal(spans.behind, wanted.behind)
    assert torch.equal(spans.end, wanted.end)
    assert torch.equal(spans.kept, kept)
