"""What `scale.py` writes: a page of tables, and a picture."""

from pathlib import Path
from typing import Any

from scale_runs import DEVICES, STEPS

Results = dict[str, Any]
"""host: what it ran on. commands. correctness: `scale_correctness`. speed: rows of `scale_speed` by name."""

DP_OWED = 7.7
"""Pythia-1.4B on eight devices, times one."""

NEOX_OWED, NEOX_PUBLISHED = 480.0, 117.0
"""TFLOP/s a device of GPT-NeoX-20B: owed, and published (Black et al. 2022, arXiv 2204.06745) on A100s of 40 GB."""

DASH = "-"


def page(results: Results) -> str:
    """Markdown."""
    host = results["host"]
    parts = [
        f"# {host['devices']} x {host['device']}, {host['date']}",
        f"{host['versions']}. Written by:",
        "```\n" + "\n".join(results["commands"]) + "\n```",
    ]
    if "correctness" in results:
        parts += ["## Correctness", *_correctness(results["correctness"])]
    if results.get("speed"):
        parts += ["## Speed", *_speed(results["speed"])]
    return "\n\n".join(parts) + "\n"


def _correctness(section: Results) -> list[str]:
    rows = [
        [check["name"], check["what"], _scientific(check["found"]), _scientific(check["bound"]), _verdict(check["ok"])]
        for check in section["checks"]
    ]
    one = section["curves"].get("one device", {})
    count = len(one.get("loss", []))
    shown = [step for step in sorted({0, 9, STEPS // 2, STEPS - 1, STEPS, count - 1}) if step < count]
    curves = section["curves"].items()
    losses = [[name, *(_loss_at(step - count, curve) for step in shown)] for name, curve in curves if curve]
    return [
        f"Largest relative differences from one device's curve, same seed and samples. Commit {_commit(section)}.",
        _table(["run", "what", "differs by", "at most", ""], rows),
        *([_table(["loss of step", *(str(step + 1) for step in shown)], losses)] if one else []),
    ]


def _loss_at(back: int, curve: Results) -> str:
    """Counted from the end: a resumed curve has the last steps alone."""
    return f"{curve['loss'][back]:.6f}" if -back <= len(curve["loss"]) else DASH


def _speed(rows: dict[str, Results]) -> list[str]:
    columns = ["run", "tokens/s", "planned", "TFLOP/s a device", "planned", "peak GiB", "held", "planned", "bubble"]
    columns += ["(p - 1) / (m + p - 1)", "recomputed", "commit"]
    note = (
        "Medians after a warm-up. Operations of a token: 6 x (parameters in matrix products, head included) + "
        "12 x L x H x S. Bubble: measured by a run of half the micro-batches; the optimizer's time is in it. Peers: "
        "transformers' class under DDP (fp32 weights, bf16 autocast), and under DeepSpeed's ZeRO (bf16, fp32 masters "
        "and accumulation)."
    )
    return [note, _table(columns, [_speed_row(row) for row in rows.values()]), *owed(rows)]


def _speed_row(row: Results) -> list[str]:
    if "tokens_per_second" not in row:
        return [row["name"], "failed", *[DASH] * 9, _commit(row)]
    planned = row.get("planned", {})
    return [
        row["name"],
        f"{row['tokens_per_second']:,.0f}",
        _number(planned.get("tokens_per_second"), "{:,.0f}"),
        f"{row['tflops']:.4g}",
        _number(planned.get("tflops"), "{:.0f}"),
        f"{row['peak_gib']:.1f}",
        f"{row['reserved_gib']:.1f}",
        _number(planned.get("peak_gib"), "{:.1f}"),
        _number(row.get("bubble"), "{:.3f}"),
        _number(row.get("bubble_computed"), "{:.3f}"),
        row.get("recompute", DASH),
        _commit(row),
    ]


def _commit(results: Results) -> str:
    return results.get("commit") or DASH


def owed(rows: dict[str, Results]) -> list[str]:
    """What was promised, beside what was measured."""
    rates = {name: row["tokens_per_second"] for name, row in rows.items() if "tokens_per_second" in row}
    lines = []
    for devices in DEVICES:
        if {"1.4B data=1", f"1.4B data={devices}"} <= rates.keys():
            times = rates[f"1.4B data={devices}"] / rates["1.4B data=1"]
            verdict = f"; owed {DP_OWED}: {_verdict(times >= DP_OWED)}" if devices == max(DEVICES) else ""
            lines.append(f"- Pythia-1.4B, data={devices} beside one: {times:.2f} times{verdict}.")
    for name, row in rows.items():
        if row["model"] == "20B" and not row["peer"] and name in rates:
            verdict = _verdict(row["tflops"] >= NEOX_OWED)
            lines.append(
                f"- GPT-NeoX-{name}: {row['tflops']:.0f} TFLOP/s a device; owed {NEOX_OWED:.0f}: {verdict}. "
                f"Published: {NEOX_PUBLISHED:.0f} on A100-40."
            )
    return ["\n".join(lines)] if lines else []


def picture(results: Results, path: Path) -> None:
    """How far each curve is from one device's, and TFLOP/s beside the plan: as far as there is something to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, rows = results.get("correctness", {}).get("curves", {}), results.get("speed", {})
    panels = [(draw, what) for draw, what in ((_draw_curves, curves), (_draw_speed, rows)) if what]
    figure, axes = pyplot.subplots(1, max(len(panels), 1), figsize=(6.5 * max(len(panels), 1), 4.5), squeeze=False)
    for place, (draw, what) in zip(axes.flat, panels, strict=False):  # a report of nothing has a panel all the same
        draw(place, what)
    host = results["host"]
    figure.suptitle(f"{host['devices']} x {host['device']}, {host['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_curves(axes: Any, curves: dict[str, Results]) -> None:
    axes.set(title="loss, relative difference from one device", xlabel="step", yscale="log")
    one = curves.get("one device")
    for name, curve in curves.items():
        if not one or not curve or curve is one:
            continue
        count = len(curve["loss"])
        pairs = zip(curve["loss"], one["loss"][-count:], strict=True)
        # A difference of none has no place on this axis.
        differences = [max(abs(a - b) / abs(b), 1e-9) for a, b in pairs]
        axes.plot(range(len(one["loss"]) - count + 1, len(one["loss"]) + 1), differences, label=name)
    if axes.lines:
        axes.legend(fontsize=7)


def _draw_speed(axes: Any, rows: dict[str, Results]) -> None:
    axes.set(title="TFLOP/s a device (marks: planned)")
    known = {name: row for name, row in rows.items() if "tflops" in row}
    places = range(len(known))
    colours = ["tab:grey" if row["peer"] else "tab:blue" for row in known.values()]
    axes.barh(places, [row["tflops"] for row in known.values()], color=colours)
    for place, row in zip(places, known.values(), strict=True):
        if "planned" in row:
            axes.plot([row["planned"]["tflops"]], [place], "k|", markersize=14)
    axes.set_yticks(places, list(known), fontsize=7)
    axes.invert_yaxis()


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else form.format(value)


def _scientific(value: float | None) -> str:
    return _number(value, "{:.1e}")


def _verdict(ok: bool) -> str:
    return "yes" if ok else "no"
