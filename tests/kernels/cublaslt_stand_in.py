"""cuBLASLt stood in for, in the memory of the host: what its functions are told is what is computed, by torch."""

import ctypes

import torch

from neox_hf.kernels import cublaslt

DTYPES = {number: dtype for dtype, number in cublaslt.DATA_TYPES.items()}
REFUSED = 15


class CublasLt:
    """The functions that are used. algorithms: how many it proposes; `refused`: those that cannot be launched.

    launched: the number of each algorithm that has computed something.
    """

    def __init__(self, algorithms=3, refused=(), version=130100):
        self.algorithms, self.refused, self.version = algorithms, set(refused), version
        self.objects, self.launched, self.preferences = {}, [], {}
        self.without_bias = 0  # how many more it proposes for a product without; the last of them takes none
        self._last = 0

    def cublasLtGetVersion(self):
        return self.version

    def cublasLtMatmulDescCreate(self, made, compute, scale):
        assert (compute.value, scale.value) == (68, 0)
        return self._make(made, {3: 0, 4: 0, 7: 1, 8: None})

    def cublasLtMatmulDescSetAttribute(self, description, attribute, value, size):
        assert ctypes.sizeof(value._obj) == size.value
        self.objects[description.value][attribute.value] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, made, dtype, rows, columns, stride):
        assert stride.value >= rows.value
        return self._make(made, (DTYPES[dtype.value], rows.value, columns.value, stride.value))

    def cublasLtMatmulPreferenceCreate(self, made):
        return self._make(made, {})

    def cublasLtMatmulPreferenceSetAttribute(self, preference, attribute, value, size):
        self.objects[preference.value][attribute.value] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceDestroy(self, made):
        self.preferences = self.objects.pop(made.value)
        return 0

    def cublasLtMatrixLayoutDestroy(self, made):
        del self.objects[made.value]
        return 0

    cublasLtMatmulDescDestroy = cublasLtMatrixLayoutDestroy

    def cublasLtMatmulAlgoGetHeuristic(self, handle, description, a, b, c, d, preference, most, found, count):
        count._obj.value = self.algorithms if self._adds_bias(description) else self.algorithms + self.without_bias
        for number in range(min(count._obj.value, most.value)):
            found[number].code.data[0] = number + 1
            found[number].workspace = 1024 * number
        return 0

    def cublasLtMatmulAlgoCheck(self, handle, description, a, b, c, d, code, said):
        number = code._obj.data[0]
        said._obj.workspace = 1024 * (number - 1)
        most = self.algorithms + self.without_bias
        return 0 if 1 <= number <= most - (self.without_bias > 0 and self._adds_bias(description)) else REFUSED

    def cublasLtMatmul(self, handle, description, alpha, a, la, b, lb, beta, c, lc, d, ld, code, space, size, stream):
        number = code._obj.data[0]
        assert (space.value is None) == (size.value == 0)
        if number in self.refused:
            return REFUSED
        said = self.objects[description.value]
        first = self._matrix(a, la, said[cublaslt.DESCRIPTION_TRANSPOSE_A])
        second = self._matrix(b, lb, said[cublaslt.DESCRIPTION_TRANSPOSE_B])
        out, before = self._matrix(d, ld), self._matrix(c, lc)
        result = alpha._obj.value * first.float() @ second.float()
        if beta._obj.value:
            result += beta._obj.value * before
        if self._adds_bias(description):
            result += memory(said[cublaslt.DESCRIPTION_BIAS_POINTER], out.dtype, out.shape[0]).float()[:, None]
        out.copy_(result)
        self.launched.append(number)
        return 0

    def _adds_bias(self, description):
        return self.objects[description.value][cublaslt.DESCRIPTION_EPILOGUE] == cublaslt.EPILOGUE_ADDS_BIAS

    def _make(self, made, what):
        self._last += 1
        made._obj.value = self._last
        self.objects[self._last] = what
        return 0

    def _matrix(self, pointer, layout, transposed=0):
        dtype, rows, columns, stride = self.objects[layout.value]
        flat = memory(pointer.value, dtype, stride * (columns - 1) + rows)
        matrix = flat.as_strided((rows, columns), (1, stride))
        return matrix.t() if transposed else matrix


def memory(address, dtype, elements):
    size = elements * torch.empty((), dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
