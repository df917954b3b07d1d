"""Each class of unusable row: its message, its count, its copy."""

import gzip
import json
from dataclasses import replace
from itertools import islice

import pytest
import zstandard

from neox_hf.data import StreamLoader, sources
from neox_hf.data.bad_rows import KINDS, without_copies
from neox_hf.errors import DataError
from tests.data.naive import first_samples, naive_samples, owned_epochs, settings_for

GOOD = [b'{"text": "first"}', b'{"text": "second"}']
# The row, its class, and what its error says after "FILE:2: ".
ROWS = {
    "cut off": (b'{"text": "x', "broken_json", "the line is not JSON: Unterminated string"),
    "a list": (b'["x"]', "not_an_object", 'wanted an object with the key "text", found list'),
    "misspelt": (b'{"txt": "x"}', "missing_key", r"no key \"text\" .*the row has \['txt'\]"),
    "null": (b'{"text": null}', "null_text", '"text" is null, wanted a string'),
    "number": (b'{"text": 3}', "not_a_string", '"text" is int, wanted a string'),
    "nested": (b'{"text": ["x"]}', "not_a_string", '"text" is list, wanted a string'),
    "empty": (b'{"text": ""}', "empty_text", '"text" is empty'),
    "blank": (b'{"text": " \\n"}', "empty_text", '"text" is empty'),
    "latin-1": (b'{"text": "\xe9t\xe9"}', "invalid_utf8", "the line is not UTF-8: .* position 10"),
    "half a pair": (b'{"text": "\\ud800"}', "invalid_utf8", '"text" is not valid Unicode: .*surrogates'),
    "too long": (b'{"text": "' + b"x" * 300 + b'"}', "long_line", "more than data.max_line_bytes=200 bytes"),
    "deep": (b"[" * 199, "broken_json", "the line is not JSON"),
}
WAY_OUT = "Mend the row, or set data.bad_rows to `skip` or `quarantine` to go on without it$"


def lines_with(row: bytes) -> bytes:
    return b"\n".join([GOOD[0], row, GOOD[1], b""])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("name", ROWS)
def test_error_names_file_and_line_class_and_way_out(tmp_path, stream_over, name, suffix):
    row, kind, detail = ROWS[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(lines_with(row)) if suffix.endswith("gz") else lines_with(row))
    with pytest.raises(DataError, match=f"^{path}:2: {kind}: .*{detail}.*{WAY_OUT}"):
        first_samples(stream_over(settings_for(path, max_line_bytes=200)), 8)


@pytest.mark.parametrize("name", ROWS)
def test_skip_and_quarantine_go_on_with_the_other_rows(tmp_path, stream_over, name):
    row, kind, _ = ROWS[name]
    (tmp_path / "a.jsonl").write_bytes(lines_with(row))
    kept = tmp_path / "kept" / "quarantine.jsonl"
    wanted = None
    for policy in ("skip", "quarantine"):
        settings = settings_for(tmp_path / "a.jsonl", max_line_bytes=200, bad_rows=policy, streams=1)
        stream = stream_over(settings, quarantine=kept)
        samples = first_samples(stream, 10)
        wanted = wanted or samples
        assert samples == wanted == naive_samples(owned_epochs(["first", "second"], 1, None), 1, 32, 10)
        assert stream.bad_rows.counts == {kind: 1}
        assert kept.exists() == (policy == "quarantine")
    (record,) = map(json.loads, kept.read_text().splitlines())
    assert record["where"] == f"{tmp_path / 'a.jsonl'}:2"
    assert record["kind"] == kind
    assert kind == "long_line" or record["row"] == row.decode("utf-8", errors="backslashreplace")


def test_a_bom_crlf_and_blank_lines_are_no_faults(tmp_path, stream_over):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([GOOD[0], b"", GOOD[1], b"", b""]))
    stream = stream_over(settings_for(path, streams=1))
    assert bytes(first_samples(stream, 1)[0][:5]) == b"first"
    assert not stream.bad_rows.counts


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_file_without_bytes(tmp_path, stream_over, name):
    (tmp_path / name).touch()
    (tmp_path / "b.jsonl").write_bytes(GOOD[0])
    with pytest.raises(DataError, match=f"{name}:1: empty_file: the file has no bytes"):
        stream_over(settings_for(tmp_path))
    loaders = [StreamLoader(stream_over(settings_for(tmp_path, bad_rows="skip"), rank, 2), 1) for rank in range(2)]
    assert [dict(loader.bad_rows) for loader in loaders] == [{"empty_file": 1}, {}]
    kept = tmp_path.with_name("quarantine.jsonl")
    for rank in range(2):
        stream_over(settings_for(tmp_path, bad_rows="quarantine"), rank, 2, quarantine=kept)
    assert [json.loads(line)["kind"] for line in kept.read_text().splitlines()] == ["empty_file"]
    kept.unlink()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no document: its 1 file\(s\) are all empty"):
        stream_over(settings_for(tmp_path, bad_rows="skip"))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_truncated_compressed_file(tmp_path, stream_over, suffix, compress):
    data = compress(b"".join(b'{"text": "%d %d"}\n' % (n, n * n * 7919) for n in range(30_000)))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a.jsonl{suffix}:\d+: damaged_file: the file is damaged or cut off: "):
        first_samples(stream_over(settings_for(path)), 100_000)
    stream = stream_over(settings_for(path, bad_rows="skip"))
    first_samples(stream, 20_000)
    assert stream.bad_rows.counts == {"damaged_file": 1}


def test_text_files(tmp_path, stream_over):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.txt:1: invalid_utf8: the text is not UTF-8"):
        first_samples(stream_over(settings_for(path)), 1)
    path.write_bytes(b"x" * 300)
    with pytest.raises(DataError, match=r"a.txt:1: long_line: .*=200 bytes; a .txt is one document unless"):
        first_samples(stream_over(settings_for(path, max_line_bytes=200)), 1)
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(b"hello" * 100)[:-10])
    with pytest.raises(DataError, match=r"b.txt.gz:1: damaged_file: "):
        first_samples(stream_over(settings_for(packed)), 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("rows", [1, 3, 12_000])
def test_a_source_of_bad_rows_alone_ends_with_an_error_and_no_hang(tmp_path, stream_over, suffix, rows):
    path = tmp_path / f"a{suffix}"
    content = b'{"txt": "x"}\n' * rows
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    settings = settings_for(path, bad_rows="skip")
    message = r"has no document for the train split in \d+ rows .*bad rows: \{'missing_key': \d+\}.*another text_key"
    with pytest.raises(DataError, match=message):
        first_samples(stream_over(settings), 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_source_of_blank_lines_alone(tmp_path, stream_over, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b"\n\n\n") if suffix.endswith("gz") else b"\n\n\n")
    with pytest.raises(DataError, match="holds no row"):
        first_samples(stream_over(settings_for(path)), 1)


def test_bad_rows_are_counted_in_the_first_epoch_alone(tmp_path, stream_over):
    (tmp_path / "a.jsonl").write_bytes(lines_with(b"{"))
    loader = StreamLoader(stream_over(settings_for(tmp_path, bad_rows="skip", streams=2)), 2)
    for _ in islice(loader, 50):
        pass
    assert loader.bad_rows == {"broken_json": 1}


def test_a_row_far_into_a_file_is_marked_by_its_byte(tmp_path, stream_over, monkeypatch):
    monkeypatch.setattr(sources, "QUICKLY_COUNTED_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_with(b"{"))
    kept = tmp_path / "quarantine.jsonl"
    first_samples(stream_over(settings_for(path, bad_rows="quarantine"), quarantine=kept), 8)
    assert json.loads(kept.read_text())["where"] == f"{path} at byte {len(GOOD[0]) + 1}"


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_of_one_replica_read_the_same_and_one_of_them_keeps_copies(tmp_path, stream_over, workers):
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines_with(row) for row, *_ in ROWS.values()))
    kept = tmp_path / "quarantine.jsonl"
    settings = settings_for(tmp_path / "a.jsonl", bad_rows="quarantine", max_line_bytes=200)
    seen = []
    for policy in (without_copies("quarantine"), "quarantine"):
        assert not kept.exists()
        loader = StreamLoader(stream_over(replace(settings, bad_rows=policy), 1, 2, quarantine=kept), 2, workers)
        batches = [batch["input_ids"].tolist() for batch in islice(loader, 20)]
        seen.append((batches, loader.state_dict(), loader.bad_rows))
        loader.close()
    assert seen[0] == seen[1]
    assert len(kept.read_text().splitlines()) == seen[1][2].total() > 0


def test_a_reader_without_copies_still_stops_at_a_bad_row(tmp_path, stream_over):
    (tmp_path / "a.jsonl").write_bytes(lines_with(b"{"))
    with pytest.raises(DataError, match=r"a.jsonl:2: broken_json"):
        first_samples(stream_over(settings_for(tmp_path, bad_rows=without_copies("error"))), 8)


def test_every_class_is_known_and_tested():
    assert {kind for _, kind, _ in ROWS.values()} | {"empty_file", "damaged_file"} == set(KINDS)
