"""Triton kernels of every norm over rows: one family, whose switches are compile-time constants.

    n = (x - mean) / size        y1 = n * weight1 + bias1        y2 = n * weight2 + bias2

KIND says what mean and size are, eps included:

    layer   mean of x;  sqrt(mean((x - mean)^2) + eps)
    rms     0;          sqrt(mean(x^2)) + eps, over the first MEASURED elements
    scale   0;          max(sqrt(sum(x^2)), eps); weight is one number

With g = dy1 * weight1 + dy2 * weight2, 1/size = inverse, and -slope * (x - mean) what 1/size changes by with x,

    dx = d_residual + g * inverse - (x - mean) * slope * sum(g * (x - mean))  [- inverse * mean(g) for layer]
    dweight = sum over rows of dy * n        dbias = sum over rows of dy

x is [rows, WIDTH], contiguous. A program holds whole rows in registers: [ROWS, BLOCK], BLOCK a power of two at least
WIDTH. Pointers may be None, which switches off what they are for. Statistics and sums are fp32; the sum that is a scale
norm's one weight gradient is fp64.
"""

from neox_hf.kernels.language import tl, triton


@triton.jit
def _measure(x, cols, eps, KIND: tl.constexpr, MEASURED: tl.constexpr):
    """Of rows x [ROWS, BLOCK], zero beyond MEASURED, with eps [ROWS]: x - mean, mean, inverse and slope [ROWS]."""
    mean = tl.zeros_like(eps)
    if KIND == "layer":
        mean = tl.sum(x, axis=1) / MEASURED
        x = tl.where(cols < MEASURED, x - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / MEASURED + eps)
        slope = inverse * inverse * inverse / MEASURED
    elif KIND == "rms":
        size = tl.sqrt_rn(tl.sum(tl.where(cols < MEASURED, x * x, 0.0), axis=1) / MEASURED)
        inverse = 1.0 / (size + eps)
        slope = tl.where(size > 0.0, inverse * inverse / (tl.where(size > 0.0, size, 1.0) * MEASURED), 0.0)
    else:
        size = tl.sqrt_rn(tl.sum(x * x, axis=1))
        inverse = 1.0 / tl.maximum(size, eps)
        slope = tl.where(size > eps, inverse * inverse * inverse, 0.0)
    return x, mean, inverse, slope


@triton.jit
def _locate(tile, rows, cols, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers [ROWS] of a tile, and offsets [ROWS, BLOCK] with whether they are inside the tensor."""
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row[:, None] * WIDTH + cols, (row < rows)[:, None] & (cols < WIDTH)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, inside, values):
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_affine(pointer, cols, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """A weight or bias [1, BLOCK] in fp32; one number for scale."""
    return tl.load(pointer).to(tl.float32) if KIND == "scale" else _load(pointer, cols, cols < WIDTH)


@triton.jit
def _store_normed(
    y_ptr, at, inside, normed, weight, bias_ptr, cols,
    KIND: tl.constexpr, WIDTH: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    if y_ptr is not None:
        y = normed * weight
        if bias_ptr is not None:
            y += _load_affine(bias_ptr, cols, KIND, WIDTH)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICTION)


@triton.jit
def forward_rows(
    x_ptr,
    first_ptr,
    second_ptr,
    total_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    y1_ptr,
    y2_ptr,
    rows,
    eps,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    MEASURED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """y1 and y2 of x, or of total = x + first + second, which is rounded before it is measured: backward reads it.

    EVICTION: of x, y1 and y2 from the second cache.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    row, at, inside = _locate(tl.program_id(0), rows, cols, WIDTH, ROWS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    weight1 = _load_affine(weight1_ptr, cols, KIND, WIDTH)
    if first_ptr is not None:
        branches = _load(first_ptr, at, inside)
        if second_ptr is not None:
            branches += _load(second_ptr, at, inside)
        total = (x + branches).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    # A row beyond the last is all zeros: any eps will do for it, but zero.
    centred, _, inverse, _ = _measure(x, cols, tl.where(row < rows, eps, 1.0), KIND, MEASURED)
    normed = centred * inverse[:, None]
    _store_normed(y1_ptr, at, inside, normed, weight1, bias1_ptr, cols, KIND, WIDTH, EVICTION)
    if weight2_ptr is not None:
        weight2 = _load_affine(weight2_ptr, cols, KIND, WIDTH)
        _store_normed(y2_ptr, at, inside, normed, weight2, bias2_ptr, cols, KIND, WIDTH, EVICTION)


@triton.jit
def _gradient_in_x(g, centred, inverse, slope, cols, KIND: tl.constexpr, WIDTH: tl.constexpr, MEASURED: tl.constexpr):
    along = slope * tl.sum(g * centred, axis=1)
    if KIND == "layer":
        g -= (tl.sum(g, axis=1) / MEASURED)[:, None]
    counted = tl.where(cols < MEASURED, centred, 0.0) if MEASURED < WIDTH else centred
    return g * inverse[:, None] - counted * along[:, None]


@triton.jit
def _store_sum(sums_ptr, place, sums, cols, KIND: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.sum(sums, axis=0)
    if KIND == "scale":
        tl.store(sums_ptr + place, columns)
    else:
        tl.store(sums_ptr + place * WIDTH + cols, columns[None, :], mask=cols < WIDTH)


@triton.jit
def _store_sums(
    sums_ptr,
    first,
    second,
    cols,
    BIASED1: tl.constexpr,
    DUAL: tl.constexpr,
    BIASED2: tl.constexpr,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """This program's partial gradients, in sums [programs, parameters, WIDTH or 1].

    first: those of weight1 and bias1, second: of weight2 and bias2; each stored if there is such a parameter.
    """
    FIRST: tl.constexpr = 2 if BIASED1 else 1
    BOTH: tl.constexpr = FIRST + (1 if DUAL else 0) + (1 if BIASED2 else 0)
    place = tl.program_id(0) * BOTH
    _store_sum(sums_ptr, place, first[0], cols, KIND, WIDTH)
    if BIASED1:
        _store_sum(sums_ptr, place + 1, first[1], cols, KIND, WIDTH)
    if DUAL:
        _store_sum(sums_ptr, place + FIRST, second[0], cols, KIND, WIDTH)
    if BIASED2:
        _store_sum(sums_ptr, place + FIRST + 1, second[1], cols, KIND, WIDTH)


@triton.jit
def backward_rows(
    x_ptr, residual_ptr, dy1_ptr, dy2_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, dx_ptr, y1_ptr, y2_ptr,
    sums_ptr, moments_ptr, rows, eps, BIASED1: tl.constexpr, BIASED2: tl.constexpr, KIND: tl.constexpr,
    WIDTH: tl.constexpr, MEASURED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, y1 and y2 again, and this program's share of the parameters' gradients, each where there is a pointer for it.

    Every program takes each num_programs-th tile. moments [2, rows]: mean and inverse for `parameter_columns`.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    weight1 = _load_affine(weight1_ptr, cols, KIND, WIDTH)
    weight2 = weight1 if weight2_ptr is None else _load_affine(weight2_ptr, cols, KIND, WIDTH)
    weight1_sums, bias1_sums = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    weight2_sums, bias2_sums = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    if KIND == "scale":  # one number, of as many terms as x has elements, which mostly cancel
        weight1_sums = tl.zeros([ROWS], tl.float64)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, at, inside = _locate(tile, rows, cols, WIDTH, ROWS)
        x, dy1 = _load(x_ptr, at, inside), _load(dy1_ptr, at, inside)
        centred, mean, inverse, slope = _measure(x, cols, tl.where(row < rows, eps, 1.0), KIND, MEASURED)
        normed = centred * inverse[:, None]
        g = dy1 * weight1
        if KIND == "scale":
            weight1_sums += tl.sum(dy1 * centred, axis=1).to(tl.float64) * inverse.to(tl.float64)
        else:
            weight1_sums += dy1 * normed
        bias1_sums += dy1
        if weight2_ptr is not None:
            dy2 = _load(dy2_ptr, at, inside)
            g += dy2 * weight2
            weight2_sums += dy2 * normed
            bias2_sums += dy2
        if dx_ptr is not None:
            dx = _gradient_in_x(g, centred, inverse, slope, cols, KIND, WIDTH, MEASURED)
            dx = dx if residual_ptr is None else dx + _load(residual_ptr, at, inside)
            _store(dx_ptr, at, inside, dx)
        _store_normed(y1_ptr, at, inside, normed, weight1, bias1_ptr, cols, KIND, WIDTH, "")
        _store_normed(y2_ptr, at, inside, normed, weight2, bias2_ptr, cols, KIND, WIDTH, "")
        if moments_ptr is not None:
            tl.store(moments_ptr + row, mean, mask=row < rows)
            tl.store(moments_ptr + rows + row, inverse, mask=row < rows)
    if sums_ptr is not None:  # else the compiler drops the sums themselves, too
        DUAL: tl.constexpr = weight2_ptr is not None
        first, second = (weight1_sums, bias1_sums), (weight2_sums, bias2_sums)
        _store_sums(sums_ptr, first, second, cols, BIASED1, DUAL, BIASED2, KIND, WIDTH)


@triton.jit
def parameter_columns(
    x_ptr,
    dy1_ptr,
    dy2_ptr,
    moments_ptr,
    sums_ptr,
    rows,
    BIASED1: tl.constexpr,
    BIASED2: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The parameters' partial gradients where rows are too wide for `backward_rows` to hold sums beside them.

    Programs [programs, columns / COLS]: each takes COLS columns of every so many rows.
    """
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    weight1_sums, bias1_sums = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    weight2_sums, bias2_sums = tl.zeros([ROWS, COLS], tl.float32), tl.zeros([ROWS, COLS], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=3):
        row, at, inside = _locate(tile, rows, cols, WIDTH, ROWS)
        x, dy1 = _load(x_ptr, at, inside), _load(dy1_ptr, at, inside)
        mean, inverse = _load(moments_ptr, row, row < rows), _load(moments_ptr + rows, row, row < rows)
        normed = (x - mean[:, None]) * inverse[:, None]
        weight1_sums += dy1 * normed
        bias1_sums += dy1
        if dy2_ptr is not None:
            dy2 = _load(dy2_ptr, at, inside)
            weight2_sums += dy2 * normed
            bias2_sums += dy2
    DUAL: tl.constexpr = dy2_ptr is not None
    first, second = (weight1_sums, bias1_sums), (weight2_sums, bias2_sums)
    _store_sums(sums_ptr, first, second, cols, BIASED1, DUAL, BIASED2, "layer", WIDTH)
