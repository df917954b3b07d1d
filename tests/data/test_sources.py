"""Every kind of source gives its documents, and says what it is when it cannot."""

import gzip
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from neox_hf.data import DataSettings, SourceSettings, StreamLoader
from neox_hf.data.bad_rows import BadRowPolicy
from neox_hf.data.sources import open_source
from neox_hf.errors import DataError
from tests.data.naive import dealt_epochs, first_samples, make_texts, naive_samples, settings_for, write_jsonl


def open_one(path, **changes):
    settings = SourceSettings(path=str(path), **changes)
    return open_source(settings, streams=4, limit=1 << 20, bad_rows=BadRowPolicy("error", Path()))


def texts_of(source) -> Iterator[str]:
    for part in range(source.parts):
        for row in source.rows(part, None):
            if row.fault is not None:
                raise row.fault
            yield source.text(part, row)


def test_stdlib_is_the_interpreters_own_source_text():
    source = open_one("stdlib")
    texts = list(texts_of(source))
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "argparse.py").read_text("utf-8") in texts
    assert 300 < source.parts < 2000
    assert 5e6 < sum(map(len, texts)) < 5e7
    assert not any(
        "site-packages" in source.where(part, 0) or "/test" in source.where(part, 0) for part in range(source.parts)
    )
    assert set(source.fingerprint()) == {"files", "digest"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_and_text_plain_and_compressed(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b'{"body": "one"}\n{"body": "t\\u0077o"}\n'))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"\xef\xbb\xbfthree\r\nfour\n"))
    assert list(texts_of(open_one(tmp_path / f"a.jsonl{suffix}", text_key="body"))) == ["one", "two"]
    assert list(texts_of(open_one(tmp_path / f"b.txt{suffix}"))) == ["three\nfour\n"]
    assert list(texts_of(open_one(tmp_path / f"b.txt{suffix}", sample_by="line"))) == ["three", "four"]


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_rows_errors_and_resumed_positions(tmp_path):
    texts = [f"text {number}" for number in range(150)]
    source = open_one(write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=100))
    assert source.parts == 2
    assert list(texts_of(source)) == texts
    assert [row.value["text"] for row in source.rows(0, 97)] == texts[97:100]
    assert source.where(1, 3).endswith("a.parquet:104")
    assert source.key(0, 3) != source.key(1, 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["ok", None]}, r'a.parquet:2: null_text: "text" is null'),
        ({"text": ["ok", ""]}, r'a.parquet:2: empty_text: "text" is empty'),
        ({"text": [1, 2]}, r'a.parquet:1: not_a_string: "text" is int'),
        ({"txt": ["ok"], "n": [1]}, r"a.parquet:1: missing_key: no key \"text\" .*\['n', 'txt'\]"),
        ({"text": pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary())}, "a.parquet:2: invalid_utf8"),
        ({"text": pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())}, "a.parquet:2: invalid_utf8"),
    ],
)
def test_bad_rows_of_parquet(tmp_path, stream_over, columns, message):
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=message):
        first_samples(stream_over(settings_for(path)), 8)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_a_parquet_file_with_a_damaged_page(tmp_path, stream_over, bad_rows):
    texts = [f"text {number} of {'some ' * 50}" for number in range(40)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=20, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    begin = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[begin + 20 : begin + 120] = b"\xff" * 100
    path.write_bytes(raw)
    settings = settings_for(path, bad_rows=bad_rows, streams=1)
    if bad_rows == "error":
        with pytest.raises(DataError, match=r"a.parquet:21: damaged_file: row group 1 is damaged: "):
            first_samples(stream_over(settings), 400)
    else:
        assert len(first_samples(stream_over(settings), 400)) == 400


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.txt", "b.parquet"])
def test_a_file_that_is_gone_during_the_run(tmp_path, stream_over, name, workers):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    path = tmp_path / name
    write_parquet(path, {"text": ["two"]}) if path.suffix == ".parquet" else write_jsonl(path, ["two"])
    loader = StreamLoader(stream_over(settings_for(tmp_path, streams=1)), 1, workers=workers)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read any more: .*No such file"):
        list(islice(loader, 40))


def test_linked_folders_are_read_once_each(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for place in (elsewhere, folder):
        place.mkdir()
        write_jsonl(place / "a.jsonl", [place.name])
    (folder / "more").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    assert sorted(texts_of(open_one(folder))) == ["elsewhere", "folder"]


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a.parquet: damaged_file: not a readable parquet file"):
        open_one(tmp_path / "a.parquet")


def test_folders_and_globs_are_sorted_and_pass_over_other_files(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "3.jsonl", ".hidden/4.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert list(texts_of(open_one(tmp_path))) == ["3.jsonl", "a/1.jsonl", "b/2.jsonl"]
    assert list(texts_of(open_one(tmp_path / "*" / "*.jsonl"))) == ["a/1.jsonl", "b/2.jsonl"]
    assert list(texts_of(open_one(tmp_path / "**" / "[13].jsonl"))) == ["3.jsonl", "a/1.jsonl"]
    assert list(open_one(tmp_path / "*" / "*.jsonl").fingerprint()) == ["a/1.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "none.jsonl does not exist; wanted `stdlib`, `hub:owner/name`, or a file, folder or glob"),
        ("a.csv", "a.csv .* is of no known format; wanted .jsonl, .txt, .parquet"),
        ("a.parquet.gz", "a.parquet.gz .* is of no known format"),
        ("*.zst", r"\*.zst matches no file of .jsonl, .txt, .parquet"),
        ("empty", "empty matches no file"),
    ],
)
def test_paths_that_name_no_data(tmp_path, path, message):
    for name in ("a.csv", "a.parquet.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        open_one(tmp_path / path)


def test_a_weight_must_be_positive(tmp_path):
    with pytest.raises(DataError, match=r"weight=0 of stdlib must be greater than 0"):
        open_one("stdlib", weight=0)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder that `datasets` reads as a dataset of three shards."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "dataset"
    folder.mkdir()
    files = [make_texts(5, seed=number) for number in range(3)]
    for number, texts in enumerate(files):
        write_jsonl(folder / f"{number}.jsonl", texts)
    return folder, files


def test_a_hub_dataset_is_streamed_by_shards(dataset, stream_over):
    folder, files = dataset
    source = open_one(f"hub:{folder}")
    assert source.parts == 3
    assert list(texts_of(source)) == [text for texts in files for text in texts]
    assert [row.position for row in source.rows(1, 3)] == [3, 4]
    assert source.where(1, 3).endswith("shard 1:4")
    wanted = naive_samples(dealt_epochs(files, 4), 4, 32, 40)
    assert first_samples(stream_over(settings_for(f"hub:{folder}")), 40) == wanted


def test_a_hub_datasets_fingerprint_names_split_and_files(dataset):
    """And of local files what is in them: nobody gives those a revision."""
    folder, files = dataset
    before = open_one(f"hub:{folder}").fingerprint()["dataset"]
    head, *named = before.rsplit(" ", 3)
    assert head == "name=None split=train shards=3"
    assert [name.split(":")[0] for name in named] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    write_jsonl(folder / "1.jsonl", files[1][:-1])
    after = open_one(f"hub:{folder}").fingerprint()["dataset"].rsplit(" ", 3)
    assert [one == other for one, other in zip(after, [head, *named], strict=True)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "hub:owner/none"}, "cannot open hub:owner/none .name=None, split=train, revision=None"),
        ({"split": "nope"}, "cannot open .*split=nope.*: Bad split: nope"),
    ],
)
def test_a_hub_dataset_that_cannot_be_opened(dataset, changes, message):
    settings = replace(SourceSettings(path=f"hub:{dataset[0]}"), **changes)
    with pytest.raises(DataError, match=message):
        open_source(settings, streams=4, limit=100, bad_rows=BadRowPolicy("error", Path()))


def test_bad_rows_of_a_hub_dataset(dataset, stream_over):
    folder, _ = dataset
    with pytest.raises(DataError, match=r"shard 0:1: missing_key: no key \"body\""):
        first_samples(stream_over(replace_key(settings_for(f"hub:{folder}"), "body")), 1)
    (folder / "1.jsonl").write_text('{"text": "ok"}\n{broken\n')
    with pytest.raises(DataError, match=r"shard 1:1 or later: the dataset cannot be read: "):
        first_samples(stream_over(settings_for(f"hub:{folder}")), 100)


def test_rows_of_a_hub_dataset_are_held_out_and_quarantined(dataset, stream_over, tmp_path):
    folder, _ = dataset
    (folder / "1.jsonl").write_text('{"text": "ok"}\n{"text": null}\n')
    settings = settings_for(f"hub:{folder}", bad_rows="quarantine", eval_fraction=1e-9)
    first_samples(stream_over(settings, quarantine=tmp_path / "bad.jsonl"), 60)
    assert json.loads((tmp_path / "bad.jsonl").read_text()) == {
        "where": f"hub:{folder} shard 1:2",
        "kind": "null_text",
        "detail": '"text" is null, wanted a string',
        "row": "{'text': None}",
    }


def replace_key(settings: DataSettings, key: str) -> DataSettings:
    return replace(settings, sources=[replace(source, text_key=key) for source in settings.sources])
