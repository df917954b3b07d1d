"""The models whose training step is measured, what each is measured as, and what is owed."""

from dataclasses import dataclass, field

from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.presets import preset_config

STEADY = ("ours-bf16", "ours-pure_bf16", "ours-bf16-selective", "ours-pure_bf16-selective")
PEERS = ("eager-amp", "compile-amp", "tuned-amp", "eager-bf16", "compile-bf16", "fixed-bf16", "tuned-bf16")


@dataclass(frozen=True)
class Size:
    """One model at one micro-batch.

    peak_gib: about what a peer takes in amp, and in bf16; so many are compiled at once as fit.
    owed: tokens/s by variant, on one H200.
    """

    name: str
    preset: str
    micro_batch: int
    sequence: int = 2048
    peak_gib: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)
    variants: tuple[str, ...] = (*STEADY, *PEERS)

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence

    def config(self) -> GPTNeoXConfig:
        return preset_config(self.preset, use_cache=False)


SIZES = {
    size.name: size
    for size in (
        Size("160m", "pythia-160m", 32, peak_gib={"amp": 62, "bf16": 59}, owed={"ours-pure_bf16": 550e3}),
        Size("410m", "pythia-410m", 16, peak_gib={"amp": 54, "bf16": 49}, owed={"ours-pure_bf16": 202e3}),
        Size(
            "1.4b",
            "pythia-1.4b",
            8,
            peak_gib={"amp": 57, "bf16": 45},
            owed={"ours-bf16": 66.5e3, "ours-pure_bf16": 68.0e3, "ours-fp8": 88e3},
            variants=(*STEADY, "ours-fp8", *PEERS),
        ),
        Size(
            "6.9b",
            "pythia-6.9b",
            4,
            peak_gib={"amp": 139, "bf16": 80},
            owed={"ours-bf16": 12.5e3, "ours-pure_bf16": 14.2e3, "ours-pure_bf16-selective": 13.8e3},
            variants=(*STEADY, "eager-bf16", "compile-bf16", "fixed-bf16", "tuned-bf16"),
        ),
        Size("tiny", "pythia-14m", 1, sequence=64, peak_gib={"amp": 1, "bf16": 1}),
    )
}

MEASURED = ("160m", "410m", "1.4b", "6.9b")
"""Sizes of a whole run; `tiny` is for trying the program out, on a CPU too."""
