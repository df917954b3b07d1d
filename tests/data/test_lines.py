"""Lines come out whole, once, wherever a span begins or a reader is put down."""

import gzip
import resource

import pytest
import zstandard

from neox_hf.data import lines
from neox_hf.data.lines import allow_open_files, compressed_rows, line_number, line_starts, plain_rows
from neox_hf.errors import DataError

LIMIT = 1000


def values(rows):
    return [row.value if row.fault is None else row.fault.kind for row in rows]


@pytest.fixture(params=[b"one\ntwo\n\nthree", b"\xef\xbb\xbfone\r\ntwo\r\n  \r\nthree\r\n"])
def three_lines(request, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(request.param)
    return path


def test_bom_crlf_blank_lines_and_a_missing_last_newline(three_lines):
    size = three_lines.stat().st_size
    assert values(plain_rows(three_lines, 0, size, LIMIT)) == [b"one", b"two", b"three"]
    packed = three_lines.with_suffix(".gz")
    packed.write_bytes(gzip.compress(three_lines.read_bytes()))
    assert values(compressed_rows(packed, 0, LIMIT)) == [b"one", b"two", b"three"]


@pytest.mark.parametrize("read_bytes", [1, 3, 64])
def test_any_cut_into_spans_gives_each_line_once(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(lines, "READ_BYTES", read_bytes)
    path = tmp_path / "a.txt"
    wanted = [b"x" * length for length in (1, 5, 30, 2, 2, 60, 1)]
    path.write_bytes(b"\n".join(wanted))
    size = path.stat().st_size
    for span in (1, 2, 7, 31, 200):
        found = [row for start in range(0, size, span) for row in plain_rows(path, start, min(start + span, size), 99)]
        assert values(found) == wanted
        for row in found:
            assert next(plain_rows(path, row.position, size, 99)) == row


@pytest.mark.parametrize("length", [1000, 1001, 1002, 1003, 300_000])
def test_a_line_over_the_limit_is_one_fault_and_the_next_line_is_read(tmp_path, length):
    content = b"ok\n" + b"x" * length + b"\nafter\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    wanted = [b"ok", b"x" * 1000 if length == 1000 else "long_line", b"after"]
    assert values(plain_rows(plain, 0, len(content), LIMIT)) == wanted
    assert values(compressed_rows(packed, 0, LIMIT)) == wanted


def test_a_thousand_streams_may_open_their_files(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    allow_open_files(100)
    allow_open_files(960)
    allow_open_files(960)
    assert limits == [(1024, 4096), (1472, 4096)]
    with pytest.raises(DataError, match=r"5000 streams each read .* may open only 4096 files; raise `ulimit -n`"):
        allow_open_files(5000)


def test_line_numbers_and_starts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a\nbb\n\nccc\n")
    assert line_starts(path).tolist() == [0, 2, 5, 6]
    assert [line_number(path, start) for start in (0, 2, 5, 6)] == [1, 2, 3, 4]


def test_zstd_of_several_frames_and_a_resumed_line(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b"one\ntwo\n") + zstandard.compress(b"three\n"))
    assert values(compressed_rows(path, 0, LIMIT)) == [b"one", b"two", b"three"]
    assert values(compressed_rows(path, 2, LIMIT)) == [b"three"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_truncated_file_gives_its_whole_lines_and_then_a_fault(tmp_path, compress):
    data = compress(b"".join(b"%d %d\n" % (n, n * n * 7919) for n in range(50_000)))
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(data[: len(data) // 2])
    found = values(compressed_rows(path, 0, LIMIT))
    assert found[-1] == "damaged_file"
    assert found[:3] == [b"0 0", b"1 7919", b"2 31676"]
    assert len(found) > 10_000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bytes_that_were_never_compressed_are_a_damaged_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b'{"text": "plain"}\n')
    assert values(compressed_rows(path, 0, LIMIT)) == ["damaged_file"]


def test_a_compressed_file_without_content(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    assert values(compressed_rows(path, 0, LIMIT)) == ["empty_file"]
