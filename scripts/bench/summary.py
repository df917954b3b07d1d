"""From raw turns to the figures of a table: medians, rates, and ours over the peers of the same numeric class."""

import statistics
from typing import Any

from neox_hf.modeling.accounting import flops_per_token
from scripts.bench.sizes import Size
from scripts.bench.variants import parse_variant

Figures = dict[str, Any]


def summarise(size: Size, figures: dict[str, Figures], sustained_tflops: float | None) -> dict[str, Figures]:
    """For each variant with a turn: ms, tokens/s, TFLOP/s, MFU against what the device sustains, if that was measured,
    peak GiB, and the extremes of its turns."""
    per_token = flops_per_token(size.config(), size.sequence)
    return {variant: _summary(size, found, per_token, sustained_tflops) for variant, found in figures.items()}


def _summary(size: Size, found: Figures, per_token: float, sustained_tflops: float | None) -> Figures:
    kept = {key: found[key] for key in ("failed", "prepare_seconds") if key in found}
    turns = found["turns"]
    if not turns:
        return {"failed": "no turn within the time", **kept}
    medians = [statistics.median(turn["step_ms"]) for turn in turns]
    ms = statistics.median(step for turn in turns for step in turn["step_ms"])
    rate = 1e3 * size.tokens / ms
    tflops = rate * per_token / 1e12
    return {
        "ms": ms,
        "tokens_s": rate,
        "tflops": tflops,
        **({"mfu": tflops / sustained_tflops} if sustained_tflops else {}),
        "peak_gib": max(turn["peak_gib"] for turn in turns),
        "turn_ms": [min(medians), max(medians)],
        "steps": sum(len(turn["step_ms"]) for turn in turns),
        "loss": turns[-1]["loss"],
        **kept,
    }


def ratios(variant: str, variants: dict[str, Figures]) -> dict[str, float]:
    """Tokens/s of one of ours over the peers of its class: `eager`, `compile`, and `tuned`, the best of all tuned."""
    ours, found = parse_variant(variant), variants[variant]
    if not ours.is_ours or "ms" not in found:
        return {}
    best: dict[str, float] = {}
    for name, figures in variants.items():
        peer = parse_variant(name)
        if peer.is_ours or "ms" not in figures or peer.numeric_class != ours.numeric_class:
            continue
        form = "tuned" if peer.form == "fixed" else peer.form
        best[form] = max(best.get(form, 0.0), figures["tokens_s"])
    return {form: found["tokens_s"] / rate for form, rate in best.items()}
