"""The names of what is measured: ours by precision and switches, peers by form and precision.

ours-pure_bf16-selective      tuned-amp
"""

from dataclasses import dataclass

from neox_hf.training.precision import PRECISIONS

SWITCHES = ("selective", "full", "compiled", "graphs", "torch", "sdpa", "cublas", "apart")
"""`selective`, `full`: what the backward pass computes again. `compiled`: `train.torch_compile`. `graphs`:
`train.cuda_graphs`, which is `auto` without. `torch`: plain references instead of kernels. `sdpa`: attention as it is
where FlashAttention 4 is not installed. `cublas`: products by the algorithm that cuBLAS estimates to be best, and
none that goes on with what comes next; `apart`: the latter alone."""

FORMS = ("eager", "compile", "fixed", "tuned")
PEER_PRECISIONS = ("amp", "bf16")


@dataclass(frozen=True)
class Variant:
    """form: `ours`, or one of FORMS. switches: of ours alone."""

    name: str
    form: str
    precision: str
    switches: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.form == "ours"

    @property
    def numeric_class(self) -> str:
        """`amp` where fp32 weights are kept somewhere, `bf16` where none are. A peer's bf16 is our pure_bf16."""
        narrow = "pure_bf16" if self.is_ours else "bf16"
        return "bf16" if self.precision == narrow else "amp"


def parse_variant(name: str) -> Variant:
    """Raises: ValueError: there is no such variant."""
    form, precision, *switches = [*name.split("-"), ""][: max(2, name.count("-") + 1)]
    ours = form == "ours" and precision in PRECISIONS and set(switches) <= set(SWITCHES)
    peer = form in FORMS and precision in PEER_PRECISIONS and not switches
    if not ours and not peer:
        raise ValueError(
            f"variant {name!r} is unknown; it is ours-PRECISION, with any of {', '.join(SWITCHES)} behind, or "
            f"one of {', '.join(FORMS)} with {' or '.join(PEER_PRECISIONS)}: ours-pure_bf16-selective, tuned-amp"
        )
    return Variant(name, form, precision, tuple(switches))
