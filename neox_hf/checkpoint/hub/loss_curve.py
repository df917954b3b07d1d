"""The picture of a run: training and evaluation loss against tokens seen."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

TOKENS = "consumed_tokens"
SERIES = (
    # key in the log, label, style
    ("loss", "training", {"color": "#4c72b0", "linewidth": 1.2}),
    ("eval_loss", "evaluation", {"color": "#c44e52", "linewidth": 1.6, "marker": "o", "markersize": 4}),
)


def plot_loss_curve(log_history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Draw the losses of a Trainer's `log_history` into the PNG file `path`, and return it.

    The x axis is tokens where every loss was logged with `consumed_tokens`, steps otherwise. A loss that is not finite
    leaves a gap. The file is replaced by renaming, so that a link to the old one keeps the old picture.
    """
    # Here and not above: matplotlib takes a second to import. Its object interface needs no display and keeps no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = [row for row in log_history if any(key in row for key, _, _ in SERIES)]
    x_key = TOKENS if rows and all(TOKENS in row for row in rows) else "step"
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in SERIES:
        points = [(row[x_key], row[key]) for row in rows if key in row]
        if points:
            axes.plot(
                [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points], label=label, **style
            )
    axes.set_xlabel("tokens" if x_key == TOKENS else "steps")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no loss was logged", ha="center", transform=axes.transAxes)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        canvas.print_png(file)
    os.replace(draft, path)
    return path
