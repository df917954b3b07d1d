"""The loss curve: what is drawn, and that the file is replaced and not rewritten."""

import math
import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from neox_hf.checkpoint.hub import plot_loss_curve

PNG = b"\x89PNG\r\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were made."""
    figures = []
    original = Figure.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "__init__", remember)
    return figures


def lines(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(xy) for xy in line.get_xydata()] for line in figure.axes[0].lines}


def test_losses_are_drawn_against_tokens(tmp_path: Path, drawn):
    history = [
        {"step": 1, "loss": 5.0, "consumed_tokens": 100},
        {"step": 2, "loss": 4.0, "consumed_tokens": 200},
        {"step": 2, "eval_loss": 4.2, "consumed_tokens": 200},
        {"step": 2, "train_runtime": 1.0},
    ]
    path = plot_loss_curve(history, tmp_path / "loss_curve.png")
    assert path == tmp_path / "loss_curve.png"
    assert path.read_bytes().startswith(PNG)
    assert lines(drawn[0]) == {"training": [(100, 5.0), (200, 4.0)], "evaluation": [(200, 4.2)]}
    assert drawn[0].axes[0].get_xlabel() == "tokens"


def test_losses_without_tokens_are_drawn_against_steps(tmp_path: Path, drawn):
    plot_loss_curve([{"step": 1, "loss": 5.0, "consumed_tokens": 9}, {"step": 2, "eval_loss": 4.0}], tmp_path / "a.png")
    assert lines(drawn[0]) == {"training": [(1, 5.0)], "evaluation": [(2, 4.0)]}
    assert drawn[0].axes[0].get_xlabel() == "steps"


def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path: Path, drawn):
    plot_loss_curve(
        [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, math.inf), (3, 4.0))], tmp_path / "a.png"
    )
    (_, (x, y), _) = lines(drawn[0])["training"]
    assert x == 2
    assert math.isnan(y)


def test_a_run_without_losses_says_so(tmp_path: Path, drawn):
    plot_loss_curve([{"step": 1, "train_runtime": 1.0}], tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no loss was logged"]


def test_the_old_picture_survives_in_its_links(tmp_path: Path):
    path = plot_loss_curve([{"step": 1, "loss": 5.0}], tmp_path / "loss_curve.png")
    before = path.read_bytes()
    os.link(path, tmp_path / "queued.png")
    plot_loss_curve([{"step": 1, "loss": 5.0}, {"step": 2, "loss": 1.0}], path)
    assert (tmp_path / "queued.png").read_bytes() == before != path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curve.png", "queued.png"]
