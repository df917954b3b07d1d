"""What is launched: the default, or what a device's file says, as far as that counts."""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass

import pytest
import torch
import triton

from neox_hf.kernels.launch_choice import LaunchChoice, for_every_shape, launches_on
from neox_hf.kernels.launch_file import (
    FORMAT,
    TunedLaunch,
    launch_path,
    read_entries,
    read_launches,
    write_entries,
)

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DEVICE = "NVIDIA H200"


@dataclass(frozen=True)
class Tiles:
    rows: int
    warps: int


ONE, TWO, FOUR = Tiles(1, 4), Tiles(2, 4), Tiles(4, 4)
CHOICE = LaunchChoice("sum_of_squares", for_every_shape(ONE, TWO, FOUR))
BY_SHAPE = LaunchChoice("by_shape", lambda columns: (Tiles(columns, 1), Tiles(2 * columns, 1)))


def entry(launch=TWO, op="sum_of_squares", dtype="bfloat16", shape=(64,)):
    return TunedLaunch(op, dtype, shape, launch if isinstance(launch, dict) else dataclasses.asdict(launch), 0.5, 0.4)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Of the file of a CUDA device that this host need not have; nothing has been looked up on it yet."""
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    launches_on.cache_clear()
    read_launches.cache_clear()
    yield launch_path(DEVICE)
    launches_on.cache_clear()
    read_launches.cache_clear()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NEOX_HF_CACHE", str(tmp_path))
    assert launch_path("NVIDIA H100 80GB HBM3 / MIG") == tmp_path / "launches" / "NVIDIA_H100_80GB_HBM3_MIG.json"
    monkeypatch.delenv("NEOX_HF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch_path(DEVICE) == tmp_path / ".cache" / "neox_hf" / "launches" / "NVIDIA_H200.json"


def test_without_a_file_the_default_holds(path, caplog):
    assert CHOICE.chosen(CUDA, torch.bfloat16, 64) is ONE
    assert BY_SHAPE.chosen(CUDA, torch.bfloat16, 64) == BY_SHAPE.default(64) == Tiles(64, 1)
    assert not caplog.records


def test_what_was_tuned_holds_for_its_dtype_and_shape_alone(path, caplog):
    write_entries(path, DEVICE, [entry(), entry(Tiles(6, 1), op="by_shape", shape=(3,))])
    with caplog.at_level(logging.INFO, logger="neox_hf"):
        assert CHOICE.chosen(CUDA, torch.bfloat16, 64) is TWO
    assert CHOICE.chosen(CUDA, torch.float32, 64) is ONE
    assert CHOICE.chosen(CUDA, torch.bfloat16, 65) is ONE
    assert CHOICE.chosen(CUDA, torch.bfloat16) is ONE
    assert BY_SHAPE.chosen(CUDA, torch.bfloat16, 3) == Tiles(6, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"launches of kernels: 2 tuned ones of {path}, else the defaults"
    ]


def test_the_cpu_reads_no_file(path):
    write_entries(path, "cpu", [entry()])
    assert CHOICE.chosen(CPU, torch.bfloat16, 64) is ONE


@pytest.mark.parametrize("launch", [Tiles(3, 4), {"rows": 2}, {"rows": 2, "warps": 4, "stages": 3}])
def test_what_is_no_candidate_is_passed_over(launch, path, caplog):
    write_entries(path, DEVICE, [entry(launch)])
    with caplog.at_level(logging.INFO, logger="neox_hf"):
        found = [CHOICE.chosen(CUDA, torch.bfloat16, 64) for _ in range(3)]
    assert found == [ONE] * 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[1].startswith("sum_of_squares, bfloat16 [64]: the tuned launch {'rows'")
    assert said[1].endswith("is no candidate any more; the default holds")


def document(**changes):
    return {"format": FORMAT, "device": DEVICE, "triton": triton.__version__, "launches": []} | changes


BROKEN = {
    "no JSON": ("{", "is no file of tuned launches"),
    "no text": (b"\xff\xfe", "is no file of tuned launches"),
    "a list": (json.dumps([1]), "is no file of tuned launches"),
    "no format": (json.dumps({"launches": []}), "is no file of tuned launches"),
    "format": (json.dumps(document(format=2)), f"is of format 2, and format {FORMAT} is read here"),
    "triton": (json.dumps(document(triton="3.1.0")), f"was tuned with Triton 3.1.0, and here is {triton.__version__}"),
    "entries": (json.dumps(document(launches=5)), "has an entry that is not as it should be"),
    "entry": (json.dumps(document(launches=[{"op": "x"}])), "has an entry that is not as it should be"),
    "launch": (
        json.dumps(document(launches=[dataclasses.asdict(entry()) | {"launch": 3}])),
        "has an entry that is not as it should be",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_count_is_passed_over_with_one_warning(name, path, caplog):
    content, reason = BROKEN[name]
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [CHOICE.chosen(CUDA, torch.bfloat16, columns) for columns in (64, 65)] == [ONE, ONE]
    launches_on(torch.device("cuda", 1))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    said = record.getMessage()
    assert said.startswith(f"{path} {reason}")
    assert said.endswith("Tune again by `python -m neox_hf.tune --config ...`, or delete the file")


def test_a_file_that_cannot_be_read_is_passed_over(path, caplog):
    path.mkdir(parents=True)
    assert CHOICE.chosen(CUDA, torch.bfloat16, 64) is ONE
    assert f"{path} cannot be read (Is a directory); kernels are launched by their defaults" in caplog.text


def test_what_is_written_is_read_and_nothing_else_is_left(path):
    entries = [entry(op="z"), entry(dtype="float32"), entry(shape=())]
    write_entries(path, DEVICE, [entry(FOUR)])
    write_entries(path, DEVICE, entries)
    assert read_entries(path) == sorted(entries, key=lambda each: each.key)
    assert os.listdir(path.parent) == [path.name]
    assert json.loads(path.read_text())["device"] == DEVICE


def test_a_file_that_cannot_be_replaced_stays(path, monkeypatch):
    write_entries(path, DEVICE, [entry()])
    monkeypatch.setattr(json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_entries(path, DEVICE, [entry(FOUR)])
    assert read_entries(path) == [entry()]
    assert os.listdir(path.parent) == [path.name]


def test_a_candidate_is_tried_and_put_back():
    launches = launches_on(CPU)
    (question,) = launches.asked_by(lambda: CHOICE.chosen(CPU, torch.float32, 8))
    assert (question.key.op, question.dtype, question.shape) == ("sum_of_squares", torch.float32, (8,))
    assert question.candidates == (ONE, TWO, FOUR)

    def fails():
        with launches.trying(question, FOUR):
            assert CHOICE.chosen(CPU, torch.float32, 8) is FOUR
            assert CHOICE.chosen(CPU, torch.float32, 9) is ONE
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert CHOICE.chosen(CPU, torch.float32, 8) is ONE


def test_what_was_asked_before_is_asked_again():
    CHOICE.chosen(CPU, torch.float32, 10)
    assert len(launches_on(CPU).asked_by(lambda: [CHOICE.chosen(CPU, torch.float32, 10) for _ in range(2)])) == 1


def test_a_look_up_costs_next_to_nothing(path):
    """Of the host's time, which launches take some 20 us of; found out once, a choice is not asked for again."""
    asked = []
    choice = LaunchChoice("counted", lambda columns: asked.append(columns) or (ONE,))
    for _ in range(100):
        choice.chosen(CUDA, torch.bfloat16, 64)
    assert asked == [64]
