"""What quack's products do with an element before it is written, in its language (CuTe).

`acc` is the product, in fp32, `c` and the other arguments what is read beside it; `D` is the result in the product's
place. Imported by `fused_product.py`, where quack is installed.
"""

import math
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.base_dsl.common import DSLBaseError  # noqa: F401 (what a compilation may fail with)
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad, RowVecReduce

from neox_hf.kernels.gelu_forms import BELL, BELL_AT_ZERO, ERF_STRETCH, ERF_TAIL, TANH_ARGUMENT, TANH_SLOPE

LOG2_E = math.log2(math.e)


def _exp2(x: Any) -> Any:
    return cute.math.exp2(x, fastmath=True)


def _erf_gate(z: Any) -> tuple[Any, Any]:
    """Phi(z), and the density at z."""
    bell = _exp2(z * z * BELL)
    t = cute.arch.rcp_approx(1.0 + ERF_STRETCH * cute.arch.fmax(z, -z))
    p = ERF_TAIL[-1]
    for coefficient in ERF_TAIL[-2::-1]:
        p = coefficient + t * p
    tail = bell * (t * p)
    return Float32(cutlass.select_(z > 0.0, 1.0 - tail, tail)), bell * BELL_AT_ZERO


def _tanh_gate(z: Any) -> tuple[Any, Any]:
    """s(z) of the tanh form, and its slope."""
    square = z * z
    small = _exp2(cute.arch.fmax(z, -z) * (TANH_ARGUMENT[0] + TANH_ARGUMENT[1] * square))
    share = cute.arch.rcp_approx(1.0 + small)
    slope = small * share * share * (TANH_SLOPE[0] + TANH_SLOPE[1] * square)
    return share * Float32(cutlass.select_(z > 0.0, Float32(1.0), small)), slope


def _with_gate(gate: Any) -> tuple[EpiMod, EpiMod, EpiMod]:
    """GELU behind a product, its backward pass behind another, and that with GELU made again."""

    @gemm_epilogue(outputs=("y",), ops={"bias": RowVecLoad("bias")})
    def gelu(acc: Any, bias: Any) -> dict[str, Any]:
        z = acc + bias
        return {"D": acc, "y": z * gate(z)[0]}

    @gemm_epilogue(reduces={"dbias": RowVecReduce("dbias")}, ops={"bias": RowVecLoad("bias")})
    def backward(acc: Any, c: Any, bias: Any) -> dict[str, Any]:
        z = c + bias
        share, slope = gate(z)
        dz = acc * (share + z * slope)
        return {"D": dz, "dbias": dz}

    @gemm_epilogue(outputs=("y",), reduces={"dbias": RowVecReduce("dbias")}, ops={"bias": RowVecLoad("bias")})
    def backward_again(acc: Any, c: Any, bias: Any) -> dict[str, Any]:
        z = c + bias
        share, slope = gate(z)
        dz = acc * (share + z * slope)
        return {"D": dz, "dbias": dz, "y": z * share}

    return gelu, backward, backward_again


erf_gelu, erf_gelu_backward, erf_gelu_backward_again = _with_gate(_erf_gate)
tanh_gelu, tanh_gelu_backward, tanh_gelu_backward_again = _with_gate(_tanh_gate)


@gemm_epilogue(reduces={"total": ColVecReduce("total")}, ops={"reference": ColVecLoad("reference")})
def powers(acc: Any, reference: Any) -> dict[str, Any]:
    """Powers of logits over each row's reference, and their sums over the columns of a tile."""
    power = _exp2(acc * LOG2_E - reference)
    return {"D": power, "total": power}


@gemm_epilogue(ops={"bias1": RowVecLoad("bias1"), "bias2": RowVecLoad("bias2")})
def residual(acc: Any, c: Any, branch: Any, bias1: Any, bias2: Any) -> dict[str, Any]:
    """Both branches of a block and their biases, added to the stream c."""
    return {"D": acc + c + (branch + (bias1 + bias2))}
