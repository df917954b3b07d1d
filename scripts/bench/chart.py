"""The tables as bars: tokens/s of each size, and times of ops over their floors."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.report import Document
from scripts.bench.sizes import SIZES
from scripts.bench.variants import parse_variant

COLOURS = {"ours": "#1b6ca8", "torch": "#9a9a9a", "compile": "#d9a441", "liger": "#5aa469"}
PEER = "#b9b9b9"
HIGHEST_RATIO = 6.0
"""Longer bars are cut, with their number at the end."""


def draw(document: Document, path: Path) -> bool:
    """Write the picture, and say so; nothing measured, nothing drawn."""
    sizes = [name for name, variants in document["steps"].items() if any("ms" in found for found in variants.values())]
    ops = [bound for bound in document["ops"]["bounds"] if bound["both_floor_ms"] and _ratios(bound, document)]
    panels = len(sizes) + bool(ops)
    if not panels:
        return False
    heights = [1 + 0.28 * len(document["steps"][name]) for name in sizes] + [1 + 0.5 * len(ops)] * bool(ops)
    figure = Figure(figsize=(9, sum(heights) + 0.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False, height_ratios=heights)[:, 0]
    for name, axis in zip(sizes, axes, strict=False):
        draw_size(axis, name, document)
    if ops:
        draw_ops(axes[-1], ops, document)
    figure.savefig(path, dpi=130)
    return True


def draw_size(axis: Axes, name: str, document: Document) -> None:
    found = {variant: row for variant, row in document["steps"][name].items() if "ms" in row}
    owed = SIZES[name].owed
    colours = [COLOURS["ours"] if parse_variant(variant).is_ours else PEER for variant in found]
    bars = axis.barh(list(found), [row["tokens_s"] / 1e3 for row in found.values()], color=colours)
    axis.bar_label(bars, [f"{row['tokens_s'] / 1e3:,.1f}" for row in found.values()], padding=3, fontsize=8)
    for place, variant in enumerate(found):
        if variant in owed:
            axis.plot([owed[variant] / 1e3] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(f"{name}: thousand tokens/s (line: owed)", fontsize=10, loc="left")
    axis.tick_params(labelsize=8)


def draw_ops(axis: Axes, ops: list[Document], document: Document) -> None:
    thickness = 0.8 / len(COLOURS)
    for number, (by, colour) in enumerate(COLOURS.items()):
        places, values = [], []
        for place, bound in enumerate(ops):
            if (ratio := _ratios(bound, document).get(by)) is not None:
                places.append(place + (number - 1.5) * thickness)
                values.append(ratio)
        if not values:
            continue
        bars = axis.barh(places, [min(value, HIGHEST_RATIO) for value in values], thickness, color=colour, label=by)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    for place, bound in enumerate(ops):
        if bound["both_target_ms"]:
            target = bound["both_target_ms"] / bound["both_floor_ms"]
            axis.plot([target] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axis.set_yticks(range(len(ops)), [bound["op"] for bound in ops], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, HIGHEST_RATIO * 1.1)
    axis.axvline(1.0, color="black", linewidth=0.7, linestyle=":")
    axis.set_title("forward and backward over the floor (line: target)", fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="lower right")


def _ratios(bound: Document, document: Document) -> dict[str, float]:
    rows = [row for row in document["ops"]["rows"] if row["op"] == bound["op"] and row.get("both_ms")]
    return {row["by"]: row["both_ms"] / bound["both_floor_ms"] for row in rows}
