"""A run that stops anywhere and goes on in any layout reads the tokens that it would have read."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from neox_hf.data import SourceSettings, StreamLoader, merge_states, sources
from neox_hf.data.encoding import DocumentEncoder
from neox_hf.errors import DataError
from tests.data.naive import first_samples, make_texts, settings_for, write_jsonl

COUNT = 48


def documents_folder(tmp_path, kind):
    """Small sources whose streams wrap several epochs within COUNT samples, and have documents longer than a sample."""
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "dealt rows":
        write_jsonl(folder / "a.jsonl.gz", make_texts(7, 1))
        write_jsonl(folder / "b.jsonl.gz", make_texts(6, 2))
    elif kind == "plain and compressed":
        write_jsonl(folder / "a.jsonl", make_texts(6, 1))
        write_jsonl(folder / "b.jsonl.gz", make_texts(7, 2))
    elif kind == "owned files":
        for number in range(13):
            write_jsonl(folder / f"{number:02}.jsonl.gz", make_texts(2, number))
    else:
        write_jsonl(folder / "a.jsonl", make_texts(15 if kind != "fewer documents than streams" else 5))
    return folder


@pytest.fixture(
    params=[
        "documents",
        "spans",
        "dealt rows",
        "plain and compressed",
        "owned files",
        "fewer documents than streams",
        "two sources",
    ]
)
def settings(request, tmp_path, monkeypatch):
    if request.param == "spans":
        monkeypatch.setattr(sources, "INDEXED_BYTES", 0)
        monkeypatch.setattr(sources, "LEAST_SPAN_BYTES", 300)
    if request.param == "two sources":
        both = [documents_folder(tmp_path, "documents"), documents_folder(tmp_path, "dealt rows")]
        weights = [SourceSettings(path=str(path), weight=weight) for path, weight in zip(both, (1, 2), strict=True)]
        return settings_for(sources=weights, streams=12, shuffle=True)
    return settings_for(documents_folder(tmp_path, request.param), streams=12, shuffle=True)


def rows_of(batch) -> list[list[int]]:
    """Samples of seq_length + 1 tokens from a batch."""
    return np.concatenate([batch["input_ids"].numpy(), batch["shift_labels"].numpy()[:, -1:]], axis=1).tolist()


def go_on(stream_over, settings, state, size, steps, batch_size=1, workers=0):
    """`steps` batches on each of `size` ranks from a global state: samples in the run's order, and the merged state."""
    ranks, states = [], []
    for rank in range(size):
        loader = StreamLoader(stream_over(settings, rank, size), batch_size, workers)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        ranks.append([row for batch in islice(loader, steps) for row in rows_of(batch)])
        states.append(loader.state_dict())
        loader.close()
    first = 0 if state is None else state["next_sample"]
    ranks = [ranks[(first + place) % size] for place in range(size)]
    return [row for step in zip(*ranks, strict=True) for row in step], merge_states(states)


@pytest.fixture
def whole(stream_over, settings):
    return first_samples(stream_over(settings), COUNT)


def test_stopping_after_every_sample(stream_over, settings, whole):
    loader = StreamLoader(stream_over(settings), 1)
    for number, _ in enumerate(islice(loader, COUNT - 3), start=1):
        again, _ = go_on(stream_over, settings, loader.state_dict(), 1, 3)
        assert again == whole[number : number + 3]


def test_stopping_again_and_again_at_other_data_sizes_batches_and_workers(stream_over, settings, whole):
    state, read = None, []
    for size, batch_size, workers in [
        (2, 3, 0),
        (4, 1, 2),
        (1, 5, 0),
        (3, 1, 0),
        (6, 1, 0),
        (2, 1, 2),
        (1, 1, 0),
        (4, 2, 0),
    ]:
        rows, state = go_on(stream_over, settings, state, size, 1, batch_size, workers)
        read += rows
    assert len(read) == state["next_sample"] == 35
    assert read == whole[: len(read)]


@pytest.mark.parametrize(("size", "workers", "batch_size"), [(1, 2, 5), (1, 5, 1), (2, 2, 3), (6, 3, 1)])
def test_workers_and_batches_do_not_change_the_sequence(stream_over, settings, whole, size, workers, batch_size):
    steps = COUNT // (size * batch_size)
    rows, _ = go_on(stream_over, settings, None, size, steps, batch_size, workers)
    assert rows == whole[: len(rows)]


def test_the_position_is_the_consumers_whatever_was_read_ahead(stream_over, settings, whole):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches = iter(loader)
    assert loader.state_dict()["next_sample"] == 0
    next(batches)
    next(batches)
    assert loader.state_dict()["next_sample"] == 4
    loader.close()
    rows, _ = go_on(stream_over, settings, loader.state_dict(), 1, 6)
    assert rows == whole[4:10]


def test_iterating_again_goes_on_where_the_consumer_stopped(stream_over, settings, whole):
    loader = StreamLoader(stream_over(settings), 2)
    first = [row for batch in islice(loader, 3) for row in rows_of(batch)]
    second = [row for batch in islice(loader, 3) for row in rows_of(batch)]
    assert first + second == whole[:12]


def test_the_state_holds_no_tokens_and_stays_small(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 12)
    for _ in islice(loader, 4):
        pass
    state = loader.state_dict()
    assert all(len(cursor) == 6 for cursor in state["cursors"])
    assert len(state["cursors"]) <= 12 * len(settings.sources)
    assert len(json.dumps(state)) < 4000


def test_resuming_tokenizes_no_document_that_is_behind(tmp_path, stream_over, monkeypatch):
    texts = make_texts(400)
    settings = settings_for(write_jsonl(tmp_path / "a.jsonl", texts), streams=2)
    loader = StreamLoader(stream_over(settings), 2)
    for _ in islice(loader, 100):
        pass
    encoded = []
    encode = DocumentEncoder.encode
    monkeypatch.setattr(DocumentEncoder, "encode", lambda self, batch: encoded.extend(batch) or encode(self, batch))
    go_on(stream_over, settings, loader.state_dict(), 1, 2)
    cursors = {cursor[1]: cursor[3] for cursor in loader.state_dict()["cursors"]}
    assert min(document.cursor.turn for document in encoded) == min(cursors.values()) > 10
    assert len(encoded) < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 16}, "seq_length: 32 in the state, 16 in this run"),
        ({"seed": 9}, "seed: 1234 in the state, 9 in this run"),
        ({"streams": 6}, "streams: 12 in the state, 6 in this run"),
        ({"shuffle": False}, "shuffle: True in the state, False in this run"),
        ({"eval_fraction": 0.5}, "held_out: 0.0 in the state, 0.5 in this run"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, stream_over, changes, message):
    settings = settings_for(documents_folder(tmp_path, "documents"), streams=12, shuffle=True)
    state = StreamLoader(stream_over(settings), 1).state_dict()
    other = StreamLoader(stream_over(replace(settings, **changes)), 1)
    with pytest.raises(DataError, match=f"belongs to another token sequence; .*{message}"):
        other.load_state_dict(state)


def test_other_data_is_refused_by_the_name_of_the_file(tmp_path, stream_over):
    folder = documents_folder(tmp_path, "dealt rows")
    settings = settings_for(folder)
    state = StreamLoader(stream_over(settings), 1).state_dict()
    write_jsonl(folder / "b.jsonl.gz", make_texts(6, 3))
    with pytest.raises(DataError, match=r"sources.0.b.jsonl.gz: '\w+' in the state, '\w+' in this run$"):
        StreamLoader(stream_over(settings), 1).load_state_dict(state)


def test_data_that_moved_is_the_same_data(tmp_path, stream_over):
    folder = documents_folder(tmp_path, "documents")
    state = StreamLoader(stream_over(settings_for(folder)), 1).state_dict()
    moved = folder.rename(tmp_path / "moved")
    StreamLoader(stream_over(settings_for(moved)), 1).load_state_dict(state)


def test_states_that_do_not_belong_together(tmp_path, stream_over):
    settings = settings_for(documents_folder(tmp_path, "documents"))
    loaders = [StreamLoader(stream_over(settings, rank, 2), 1) for rank in range(2)]
    zero, one = (loader.state_dict() for loader in loaders)
    with pytest.raises(DataError, match="no data states to merge"):
        merge_states([])
    with pytest.raises(DataError, match=r"one data state of each of 2 data ranks, found those of ranks \[1\]"):
        merge_states([one])
    next(iter(loaders[0]))
    with pytest.raises(
        DataError, match=r"next samples of the ranks are \[1, 2\], after 0 or 1 sample\(s\) on each rank"
    ):
        merge_states([loaders[0].state_dict(), one])
    with pytest.raises(
        DataError, match=r"different moments: the next samples of the ranks are \[0, 3\], after 0 sample"
    ):
        merge_states([zero, {**one, "next_sample": 3}])
    with pytest.raises(DataError, match="seed: 1 in the state, 1234 in the state of another rank"):
        merge_states([zero, {**one, "fingerprint": {**one["fingerprint"], "seed": 1}}])
    with pytest.raises(DataError, match=r"rank\(s\) \[1\] of 2, this is rank 0 of 2; merge the states"):
        loaders[0].load_state_dict(one)
    with pytest.raises(DataError, match="format 0, this version reads 1"):
        loaders[0].load_state_dict({**zero, "format": 0})
    loaders[1].load_state_dict(one)


def test_positions_by_rules_of_before_are_refused(tmp_path, stream_over):
    """Samples came in another order from several sources, and from a folder of plain and compressed files."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = (write_jsonl(tmp_path / name / "a.jsonl", make_texts(9)) for name in ("one", "other"))
    write_jsonl(other.parent / "b.jsonl.gz", make_texts(9))
    for settings, rule in (
        (settings_for(one), None),
        (settings_for(one, other), "mixed"),
        (settings_for(other.parent), "plain files beside compressed ones"),
    ):
        loader = StreamLoader(stream_over(settings), 1)
        state = loader.state_dict()
        fingerprint = {name: value for name, value in state["fingerprint"].items() if name != rule}
        if rule is None:
            loader.load_state_dict(state)
        else:
            with pytest.raises(DataError, match=rule):
                loader.load_state_dict(state | {"fingerprint": fingerprint})
