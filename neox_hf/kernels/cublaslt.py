"""cuBLASLt, called in the library that torch has loaded, for the one thing that torch does not offer: which algorithm.

The library proposes several for a product, best first by its own estimate; torch takes the first. It thinks in columns:
a row-major out = a b is its out^T = b^T a^T, and a row-major matrix its own transpose.
Source: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api; the numbers below are those of `cublasLt.h`.
"""

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPUTE_IN_FP32 = 68
DATA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}

DESCRIPTION_TRANSPOSE_A, DESCRIPTION_TRANSPOSE_B, DESCRIPTION_EPILOGUE, DESCRIPTION_BIAS_POINTER = 3, 4, 7, 8
EPILOGUE_ADDS_BIAS = 4

PREFERENCE_WORKSPACE, PREFERENCE_REDUCTION, PREFERENCE_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
REDUCTION_IN_FP32 = 2
"""Where a product is split along its sum, the parts are added in fp32, never in the dtype of the result."""

MOST_WORKSPACE = 64 * 2**20
PROPOSALS = 16
"""Asked for; cuBLAS 13.1 gives eight."""


class CublasLtError(RuntimeError):
    """A function of the library has answered with a status other than success."""


class Matrix(NamedTuple):
    """How an operand lies: row by row, or `transposed`, column by column; elements from one to the next."""

    transposed: bool
    stride: int


class Problem(NamedTuple):
    """out [rows, columns] = a [rows, inner] b [inner, columns] + bias [columns], out row by row.

    alignment: bytes that all operands begin at a multiple of.
    """

    rows: int
    columns: int
    inner: int
    a: Matrix
    b: Matrix
    out_stride: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    biased: bool
    alignment: int


class _Code(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Proposal(ctypes.Structure):
    _fields_ = (
        ("code", _Code),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Algorithm(NamedTuple):
    """One way to compute a problem, and the bytes of memory that it needs for itself."""

    code: _Code
    workspace: int

    @property
    def text(self) -> str:
        """The library's own encoding, which its versions do not share."""
        return bytes(self.code).hex()


def is_encoding(text: str) -> bool:
    """Whether `text` could be that of an algorithm.

    Raises:
        ValueError: it is not hexadecimal.
    """
    return len(bytes.fromhex(text)) == ctypes.sizeof(_Code)


@functools.cache
def cublaslt() -> Any:
    """The library, or None where torch has loaded none (no CUDA, or ROCm)."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None
    library.cublasLtGetVersion.restype = c_size_t
    return library


class Product:
    """A problem as the library knows it.

    Raises:
        CublasLtError: the library refuses it.
    """

    def __init__(self, library: Any, problem: Problem) -> None:
        self._library, self._problem = library, problem
        rows, columns, inner, a, b, out_stride, dtype, out_dtype, biased, self._alignment = problem
        self._description = self._made("cublasLtMatmulDescCreate", c_int(COMPUTE_IN_FP32), _data_type(torch.float32))
        # Its first operand is our second, and each is its own transpose, as the result is.
        self._describe(DESCRIPTION_TRANSPOSE_A, c_int32(b.transposed))
        self._describe(DESCRIPTION_TRANSPOSE_B, c_int32(a.transposed))
        if biased:
            self._describe(DESCRIPTION_EPILOGUE, c_uint32(EPILOGUE_ADDS_BIAS))
            self._describe(DESCRIPTION_BIAS_POINTER, c_void_p(self._alignment))  # for how it is aligned
        self._first = self._layout(dtype, *((inner, columns) if b.transposed else (columns, inner)), b.stride)
        self._second = self._layout(dtype, *((rows, inner) if a.transposed else (inner, rows)), a.stride)
        self._out = self._layout(out_dtype, columns, rows, out_stride)

    def __del__(self) -> None:
        for name in ("_first", "_second", "_out"):
            if hasattr(self, name):
                self._library.cublasLtMatrixLayoutDestroy(getattr(self, name))
        if hasattr(self, "_description"):
            self._library.cublasLtMatmulDescDestroy(self._description)

    def proposals(self) -> list[Algorithm]:
        """Best first, by the library's estimate.

        With a bias it has left out the tiles that were quickest (on Hopper by up to a tenth), and of a kind that it
        proposes without one. So what it proposes for the product without its bias is among them, if it takes the bias.
        """
        found = self._proposed()
        if self._problem.biased:
            without = Product(self._library, self._problem._replace(biased=False))._proposed()
            known = {algorithm.text for algorithm in found}
            others = (self.restored(each.text) for each in without if each.text not in known)
            found += [each for each in others if each is not None]
        return found

    def _proposed(self) -> list[Algorithm]:
        preference = self._made("cublasLtMatmulPreferenceCreate")
        try:
            self._prefer(preference, PREFERENCE_WORKSPACE, c_uint64(MOST_WORKSPACE))
            self._prefer(preference, PREFERENCE_REDUCTION, c_uint32(REDUCTION_IN_FP32))
            for attribute in PREFERENCE_ALIGNMENTS:
                self._prefer(preference, attribute, c_uint32(self._alignment))
            found, count = (_Proposal * PROPOSALS)(), c_int(0)
            call = (preference, c_int(PROPOSALS), found, byref(count))
            _check(self._library.cublasLtMatmulAlgoGetHeuristic(_handle(), *self._parts(), *call))
        finally:
            self._library.cublasLtMatmulPreferenceDestroy(preference)
        return [Algorithm(each.code, each.workspace) for each in found[: count.value] if each.state == 0]

    def restored(self, text: str) -> Algorithm | None:
        """The algorithm of that `text`, which another problem may have had; None if it is none for this one."""
        code, said = _Code.from_buffer_copy(bytes.fromhex(text)), _Proposal()
        status = self._library.cublasLtMatmulAlgoCheck(_handle(), *self._parts(), byref(code), byref(said))
        sound = status == 0 and said.state == 0 and said.workspace <= MOST_WORKSPACE
        return Algorithm(code, said.workspace) if sound else None

    def run(
        self, algorithm: Algorithm, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, keep: bool = False
    ) -> None:
        """out = a b + bias, on the current stream; plus what is in out, if `keep`.

        Raises:
            CublasLtError: the library could not launch it.
        """
        if bias is not None:
            self._describe(DESCRIPTION_BIAS_POINTER, c_void_p(bias.data_ptr()))
        workspace = out.new_empty(algorithm.workspace, dtype=torch.uint8) if algorithm.workspace else None
        pointer = c_void_p(out.data_ptr())
        status = self._library.cublasLtMatmul(
            _handle(),
            self._description,
            byref(c_float(1.0)),
            c_void_p(b.data_ptr()),
            self._first,
            c_void_p(a.data_ptr()),
            self._second,
            byref(c_float(1.0 if keep else 0.0)),
            pointer,
            self._out,
            pointer,
            self._out,
            byref(algorithm.code),
            c_void_p(0 if workspace is None else workspace.data_ptr()),
            c_size_t(algorithm.workspace),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        _check(status)

    def _parts(self) -> tuple[c_void_p, ...]:
        return self._description, self._first, self._second, self._out, self._out

    def _made(self, function: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        _check(getattr(self._library, function)(byref(made), *arguments))
        return made

    def _layout(self, dtype: torch.dtype, rows: int, columns: int, stride: int) -> c_void_p:
        sizes = (c_uint64(rows), c_uint64(columns), c_int64(stride))
        return self._made("cublasLtMatrixLayoutCreate", _data_type(dtype), *sizes)

    def _describe(self, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        _check(self._library.cublasLtMatmulDescSetAttribute(self._description, c_int(attribute), byref(value), size))

    def _prefer(self, preference: c_void_p, attribute: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        _check(self._library.cublasLtMatmulPreferenceSetAttribute(preference, c_int(attribute), byref(value), size))


def _data_type(dtype: torch.dtype) -> c_int:
    return c_int(DATA_TYPES[dtype])


def _handle() -> c_void_p:
    """torch's handle of cuBLAS for the current device, which serves as one of cuBLASLt."""
    return c_void_p(torch.cuda.current_blas_handle())


def _check(status: int) -> None:
    if status != 0:
        raise CublasLtError(f"cuBLASLt answered with status {status}")
