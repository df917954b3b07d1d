"""What is made of a profile, and who may make one."""

import pytest
import torch

from scripts.bench.profile import NO_DEVICE, Span, busy_microseconds, by_kernel, main, text

SPANS = [Span("product", 0, 300), Span("sum", 250, 400), Span("product", 600, 900)]


def test_time_that_two_kernels_share_is_busy_once():
    assert busy_microseconds(SPANS) == 400 + 300
    assert busy_microseconds([Span("long", 0, 100), Span("within", 10, 20), Span("after", 100, 130)]) == 130


def test_kernels_are_added_up_and_the_longest_comes_first():
    assert by_kernel(SPANS) == [("product", 600, 2), ("sum", 150, 1)]


def test_the_table_is_of_one_step():
    first, *lines = text("tiny ours-bf16", SPANS, 2, 1).splitlines()
    assert first == "tiny ours-bf16; profiled: 0.5 ms a step, 0.3 of them busy, 3 launches"
    assert [line.split() for line in lines] == [["0.300", "ms", "1.0", "x", "product"]]


def test_without_a_device_there_is_no_profile(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tiny", "ours-bf16"]) == NO_DEVICE
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("ours-bf17", "variant 'ours-bf17' is unknown; it is ours-PRECISION"),
        ("tuned-bf16", "tuned-bf16 is a peer; a profile is of ours, as ours-bf16"),
    ],
)
def test_of_what_there_is_no_profile(variant, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tiny", variant])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_a_profile_of_a_tiny_step(tmp_path, capsys):
    assert main(["tiny", "ours-bf16", "--steps", "3", "--out", str(tmp_path / "profile.txt")]) == 0
    written = (tmp_path / "profile.txt").read_text()
    assert "_adamw_kernel" in written
    assert written.strip() in capsys.readouterr().out
