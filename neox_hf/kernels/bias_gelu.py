"""Bias and GELU.

    z = x + bias
    erf form:   y = z/2 (1 + erf(z / sqrt 2))
    tanh form:  y = z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))

Shapes: x [..., F], bias [F]; returns [..., F] in x's dtype, computed in fp32 and rounded once.
Source: Hendrycks and Gimpel, 2016, arXiv 1606.08415. GPT-NeoX's `bias_gelu_fusion` is the tanh form; released Pythia
configurations say the erf form, 20B's the tanh form (`gelu_fast`).
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from neox_hf.kernels.dispatch import Op

GeluForm = Literal["erf", "tanh"]
TORCH_FORMS: dict[str, str] = {"erf": "none", "tanh": "tanh"}


def bias_gelu_reference(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """torch's GELU, which works in fp32 inside; so does the addition of the bias here."""
    if bias is None:
        return F.gelu(x, approximate=TORCH_FORMS[form])
    return F.gelu(x.float() + bias.float(), approximate=TORCH_FORMS[form]).to(x.dtype)


BIAS_GELU = Op("bias_gelu", torch=bias_gelu_reference)


def bias_gelu(x: Tensor, bias: Tensor | None, form: GeluForm, *, backend: str = "auto") -> Tensor:
    """GELU of x [..., F] + bias [F]; `bias=None` when the product that made x has added it already.

    Raises:
        ValueError: the form is neither erf nor tanh.
    """
    if form not in TORCH_FORMS:
        raise ValueError(f"GELU form {form!r} is unknown; choose one of {', '.join(TORCH_FORMS)}")
    return BIAS_GELU.choose(backend, x)(x, bias, form)
