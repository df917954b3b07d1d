"""The document of a benchmark: JSON that runs add to, and the tables made of it."""

import json
from pathlib import Path
from typing import Any

from scripts.bench.measure_ops import ALLOWED, NEGLIGIBLE
from scripts.bench.sizes import SIZES
from scripts.bench.summary import ratios

Document = dict[str, Any]


def empty() -> Document:
    """runs: what was started, when, with which versions, and what its device gave. The rest is by section."""
    return {"runs": [], "accuracy": [], "ops": {"bounds": [], "rows": []}, "steps": {}}


def merged(documents: list[Document]) -> Document:
    """Later ones win: an op's row by its implementation, a size as a whole, for its variants took turns together."""
    whole = empty()
    for document in documents:
        whole["runs"] += [run for run in document["runs"] if run not in whole["runs"]]
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


def markdown(document: Document, picture: str | None) -> str:
    """The page. picture: what `draw` has written beside it, if it has."""
    parts = ["# Kernels and training step on one device", _runs(document)]
    if picture is not None:
        parts.append(f"![tokens/s of each size, and times of ops over their floors]({picture})")
    parts += [_steps(document), _ops(document), _accuracy(document)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _runs(document: Document) -> str:
    return "\n\n".join(
        f"{run['date']}, {run['device']}, {run['versions']}:\n\n```\n{run['command']}\n```{_ceilings(run)}"
        for run in document["runs"]
    )


CEILINGS = {
    "copy_gb_s": "{:,.0f} GB/s for a copy of 4 GiB, read and written",
    "sustained_tflops": "{:.0f} TFLOP/s for bf16 products 8192³ after 3 s",
    "burst_tflops": "{:.0f} TFLOP/s for the first ten of them",
}


def _ceilings(run: Document) -> str:
    """Of the device that this run was given: no two are equally fast."""
    found = run.get("ceilings", {})
    parts = [text.format(found[name]) for name, text in CEILINGS.items() if name in found]
    return f"\n\nIts device gave {', '.join(parts)}." if parts else ""


def _steps(document: Document) -> str:
    columns = ["variant", "ms", "min-max", "tokens/s", "owed", "TFLOP/s", "MFU", "peak GiB"]
    columns += ["/ eager", "/ compile", "/ tuned"]
    parts = []
    for name, variants in document["steps"].items():
        size = SIZES[name]
        rows = [_step_row(variant, variants, size.owed.get(variant), columns) for variant in variants]
        title = f"### {name}, micro-batch {size.micro_batch} x {size.sequence} tokens{_device(variants)}"
        parts.append(f"{title}\n\n{table(columns, rows)}")
    if not parts:
        return ""
    return "## Training step\n\n" + STEPS_TEXT + "\n\n" + "\n\n".join(parts)


def _device(variants: dict[str, Document]) -> str:
    """What the device sustained, which MFU is beside."""
    sustained = [found["tflops"] / found["mfu"] for found in variants.values() if found.get("mfu")]
    return f", a device of {sustained[0]:.0f} TFLOP/s" if sustained else ""


STEPS_TEXT = """\
Ours is `NeoXTrainer`, with `train.precision` and switches. Peers are transformers' own class: `eager`, `compile` as
shipped, `fixed` (compiled, `is_causal`), `tuned` (fixed, with Liger's fused head and loss). All clip at 1, with fused
AdamW. Medians of steps in turns that interleave; min-max are medians of turns. TFLOP/s: tokens/s x (6 x parameters in
matrix products, the head included, + 12 x layers x hidden size x 2048); MFU is against what the device sustained, if
that was measured. `/ tuned` is over the better of `fixed` and `tuned`; ours with fp32 masters (`bf16`) stands beside
`amp`, `pure_bf16` beside `bf16`."""


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
        figure(found.get("mfu"), ".1%"),
        f"{found['peak_gib']:.1f}",
        *(figure(over.get(form), ".3f") for form in ("eager", "compile", "tuned")),
    ]


OPS_TEXT = """\
Forward / forward and backward, ms, at Pythia-1.4B's shapes (16,384 tokens). Floors: bytes at 4285 GB/s or products at
675 TFLOP/s (the head's at 710, eight bits at 1322), whichever is longer. GiB: what forward and backward take beyond
their inputs, ours, and what is owed. "-" was not measured."""


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
        missing = {kind: "-" if kind in bound.get("timed", ()) else "" for kind in kinds}
        lines.append(
            [
                bound["op"],
                *(_times(found[kind]) or missing[kind] for kind in kinds),
                _times(bound, "_floor"),
                _times(bound, "_target"),
                _gib(found["ours"].get("extra_gib"), bound.get("most_gib")),
            ]
        )
    return f"## Ops\n\n{OPS_TEXT}\n\n" + table(["op", *kinds, "floor", "target", "GiB"], lines)


def _gib(found: float | None, most: float | None) -> str:
    return figure(found, ".2f") + (f", owed {most}" if most is not None else "")


def _times(row: Document, of: str = "") -> str:
    if "failed" in row:
        return _reason(row)
    times = [figure(row.get(f"{part}{of}_ms")) for part in ("forward", "both")]
    return " / ".join(time or "-" for time in times) if any(times) else ""


def _reason(row: Document) -> str:
    """Why it failed, as far as a cell has room."""
    return row["failed"].replace("|", "/").split("\n")[0][:80]


ACCURACY_TEXT = f"""\
The largest relative error of outputs and gradients, each by its norm, against fp64. No further than torch: at most
{ALLOWED} times its error, for roundings fall out differently, and {NEGLIGIBLE:.0e}, a last bit or two of fp32."""


def _accuracy(document: Document) -> str:
    if not document["accuracy"]:
        return ""
    rows = [[row["op"], row["dtype"], *_errors(row)] for row in document["accuracy"]]
    return f"## Accuracy\n\n{ACCURACY_TEXT}\n\n" + table(["op", "dtype", "torch", "ours", "no further"], rows)


def _errors(row: Document) -> list[str]:
    """Cells: torch, ours, no further."""
    if "failed" in row:
        return ["", _reason(row), "**no**"]
    return [f"{row['torch']:.2e}", f"{row['ours']:.2e}", "yes" if row["good"] else "**no**"]
