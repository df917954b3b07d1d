"""The document of a benchmark: JSON that runs add to, and the tables made of it."""

import json
from pathlib import Path
from typing import Any

from scripts.bench.sizes import SIZES
from scripts.bench.summary import ratios

Document = dict[str, Any]


def empty() -> Document:
    """runs: what was started, when, with which versions. The rest is by section."""
    return {"runs": [], "ceilings": {}, "accuracy": [], "ops": {"bounds": [], "rows": []}, "steps": {}}


def merged(documents: list[Document]) -> Document:
    """Later ones win: an op's row by its implementation, a size as a whole, for its variants took turns together."""
    whole = empty()
    for document in documents:
        whole["runs"] += [run for run in document["runs"] if run not in whole["runs"]]
        whole["ceilings"] |= document["ceilings"]
        whole["steps"] |= document["steps"]
        whole["accuracy"] = _updated(whole["accuracy"], document["accuracy"], ("op", "dtype"))
        for part, keys in (("bounds", ("op",)), ("rows", ("op", "by"))):
            whole["ops"][part] = _updated(whole["ops"][part], document["ops"][part], keys)
    return whole


def _updated(rows: list[Document], newer: list[Document], keys: tuple[str, ...]) -> list[Document]:
    by_key = {tuple(row[key] for key in keys): row for row in [*rows, *newer]}
    return list(by_key.values())


def read_json(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(document: Document, path: Path) -> None:
    """Whole or not at all: a run may be cut at any time."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def markdown(document: Document, picture: str) -> str:
    parts = ["# Kernels and training step on one device", _runs(document)]
    if document["steps"] or document["ops"]["rows"]:
        parts.append(f"![tokens/s of each size, and times of ops over their floors]({picture})")
    parts += [_ceilings(document), _steps(document), _ops(document), _accuracy(document)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _runs(document: Document) -> str:
    return "\n\n".join(
        f"{run['date']}, {run['device']}, {run['versions']}:\n\n```\n{run['command']}\n```" for run in document["runs"]
    )


def _ceilings(document: Document) -> str:
    found = document["ceilings"]
    if not found:
        return ""
    rows = [
        ["copy of 4 GiB, read and written", f"{found['copy_gb_s']:,.0f} GB/s"],
        ["bf16 products 8192³, the first ten", f"{found['burst_tflops']:.0f} TFLOP/s"],
        ["bf16 products 8192³, after 3 s", f"{found['sustained_tflops']:.0f} TFLOP/s"],
    ]
    return "## Ceilings\n\n" + table(["what", "measured"], rows)


def _steps(document: Document) -> str:
    columns = ["variant", "ms", "min-max", "tokens/s", "owed", "TFLOP/s", "MFU", "peak GiB"]
    columns += ["/ eager", "/ compile", "/ tuned"]
    parts = []
    for name, variants in document["steps"].items():
        size = SIZES[name]
        rows = [_step_row(variant, variants, size.owed.get(variant), columns) for variant in variants]
        title = f"### {name}, micro-batch {size.micro_batch} x {size.sequence} tokens"
        parts.append(f"{title}\n\n{table(columns, rows)}")
    if not parts:
        return ""
    return "## Training step\n\n" + STEPS_TEXT + "\n\n" + "\n\n".join(parts)


STEPS_TEXT = """\
Ours is `NeoXTrainer`, with `train.precision` and switches. Peers are transformers' own class: `eager`, `compile` as
shipped, `fixed` (compiled, `is_causal`), `tuned` (fixed, with Liger's fused head and loss). All clip at 1, with fused
AdamW. Medians of steps in turns that interleave; min-max are medians of turns. MFU is against what the device sustains.
`/ tuned` is over the better of `fixed` and `tuned`; ours with fp32 masters (`bf16`) stands beside `amp`, `pure_bf16`
beside `bf16`."""


def _step_row(variant: str, variants: dict[str, Document], owed: float | None, columns: list[str]) -> list[str]:
    found = variants[variant]
    if "ms" not in found:
        return [variant, found["failed"], *[""] * (len(columns) - 2)]
    over = ratios(variant, variants)
    low, high = found["turn_ms"]
    return [
        variant,
        f"{found['ms']:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{found['tokens_s']:,.0f}",
        figure(owed, ",.0f"),
        f"{found['tflops']:.0f}",
        f"{found['mfu']:.1%}",
        f"{found['peak_gib']:.1f}",
        *(figure(over.get(form), ".3f") for form in ("eager", "compile", "tuned")),
    ]


OPS_TEXT = """\
Forward / forward and backward, ms, at Pythia-1.4B's shapes (16,384 tokens). Floors: bytes at 4285 GB/s or products at
675 TFLOP/s, whichever is longer. GiB: what forward and backward take beyond their inputs, ours."""


def _ops(document: Document) -> str:
    rows = {(row["op"], row["by"]): row for row in document["ops"]["rows"]}
    if not rows:
        return ""
    kinds = ("torch", "compile", "liger", "ours")
    lines = []
    for bound in document["ops"]["bounds"]:
        found = {kind: rows.get((bound["op"], kind), {}) for kind in kinds}
        if not any(found.values()):
            continue
        lines.append(
            [
                bound["op"],
                *(_times(found[kind]) for kind in kinds),
                _times(bound, "_floor"),
                _times(bound, "_target"),
                figure(found["ours"].get("extra_gib"), ".2f"),
            ]
        )
    return f"## Ops\n\n{OPS_TEXT}\n\n" + table(["op", *kinds, "floor", "target", "GiB"], lines)


def _times(row: Document, of: str = "") -> str:
    if "failed" in row:
        return row["failed"].replace("|", "/").split("\n")[0][:80]
    times = [figure(row.get(f"{part}{of}_ms")) for part in ("forward", "both")]
    return " / ".join(time or "-" for time in times) if any(times) else ""


def _accuracy(document: Document) -> str:
    if not document["accuracy"]:
        return ""
    rows = [
        [row["op"], row["dtype"], f"{row['torch']:.2e}", f"{row['ours']:.2e}", "yes" if row["good"] else "**no**"]
        for row in document["accuracy"]
    ]
    text = "The largest relative error of outputs and gradients, each by its norm, against fp64."
    return f"## Accuracy\n\n{text}\n\n" + table(["op", "dtype", "torch", "ours", "no further than torch"], rows)
