"""The Triton rotary embedding, run by Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from neox_hf.kernels import rotary, rotary_launches
from neox_hf.kernels.qkv_gradient import hand_over, heads, interleaved
from neox_hf.kernels.rotary import KEEPS_ROTATION, ROTARY
from neox_hf.kernels.rotary_back import rotary_back_with_sums
from neox_hf.modeling.recompute import selective_contexts
from tests.kernels.rotary_back_cases import HEAD_AND_ROTARY_SIZES, check_back

BATCH, SEQUENCE, COUNT, SIZE, ROTATED = 2, 3, 3, 32, 8
IN_PLACE = torch.ops.neox_hf.rotary_in_place.default
ASSEMBLE = torch.ops.neox_hf.rotary_assemble.default


def angles(length, rotated, batch=1):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
    positions = torch.arange(length) + 7 * torch.arange(batch)[:, None]
    t = positions[..., None] * frequencies
    return t.cos(), t.sin()


def produced(batch=BATCH, sequence=SEQUENCE, count=COUNT, size=SIZE, dtype=torch.float32):
    """A projection that has a gradient and is no leaf, and what it was made from."""
    leaf = torch.randn(batch, sequence, count, 3, size).to(dtype).requires_grad_()
    return leaf * 1.0, leaf


class Projection(torch.nn.Module):
    """Linear, rotation, attention: what a layer does with a query, key and value."""

    def __init__(self, in_place=True):
        super().__init__()
        self.linear = torch.nn.Linear(6, COUNT * 3 * SIZE)
        self.angles = angles(SEQUENCE, ROTATED)
        self.in_place = in_place

    def forward(self, x, backend="triton"):
        qkv = F.linear(x, self.linear.weight, self.linear.bias.detach()).view(*x.shape[:2], COUNT, 3, SIZE)
        query, key, value = rotary(qkv, *self.angles, in_place=self.in_place, bias=self.linear.bias, backend=backend)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def gradients(self, run, x):
        self.zero_grad()
        x = x.clone().requires_grad_()
        (run(x) ** 2).sum().backward()
        return x.grad, self.linear.weight.grad.clone(), self.linear.bias.grad.clone()


@pytest.fixture
def layer():
    return Projection()


@pytest.fixture
def x():
    return torch.randn(BATCH, SEQUENCE, 6)


def assert_same(found, wanted, tolerance=1e-5):
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "rotated"),
    [(32, 8), (32, 32), (64, 16), (80, 20), (80, 80), (96, 24), (96, 96), (128, 32), (256, 64), (256, 256)],
)
def test_no_further_from_fp64_than_the_reference(size, rotated, dtype):
    t = angles(SEQUENCE, rotated, BATCH)
    given = torch.randn(BATCH, SEQUENCE, COUNT, 3, size).to(dtype)
    upstream = [torch.randn(BATCH, COUNT, SEQUENCE, size).to(dtype) for _ in range(3)]

    def run(backend, dtype):
        leaf = given.to(dtype).requires_grad_()
        outputs = rotary(leaf * 1.0, *(a.to(torch.promote_types(dtype, a.dtype)) for a in t), backend=backend)
        torch.autograd.backward(outputs, [g.to(dtype) for g in upstream])
        return [x.detach().double() for x in (*outputs, leaf.grad)]

    truth = run("torch", torch.float64)
    for found, reference, exact in zip(run("triton", dtype), run("torch", dtype), truth, strict=True):
        if dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds: one unit in the last place
            assert ((found - exact).abs() <= exact.abs() * 2**-7 + 1e-6).all()
        else:
            assert (found - exact).abs().max() <= (reference - exact).abs().max() * 1.05 + 1e-6


@pytest.mark.parametrize("batch_of_angles", [1, BATCH])
def test_rotates_where_the_bytes_are(batch_of_angles):
    qkv, _ = produced()
    before = qkv.detach().clone()
    cos, sin = angles(SEQUENCE, ROTATED, batch_of_angles)
    query, key, value = rotary(qkv, cos, sin, backend="triton")
    for i, x in enumerate((query, key, value)):
        assert x.data_ptr() == qkv[..., i, :].data_ptr()
        assert x.stride() == qkv[..., i, :].transpose(1, 2).stride()
    assert torch.equal(value, before[..., 2, :].transpose(1, 2))
    assert torch.equal(qkv[..., ROTATED:], before[..., ROTATED:])
    assert_same((query, key), rotary(before, cos, sin, backend="torch")[:2])


def test_a_buffer_that_is_somebodys_is_copied():
    leaf = torch.randn(BATCH, SEQUENCE, COUNT, 3, SIZE, requires_grad=True)
    flat = torch.randn(BATCH, SEQUENCE, COUNT * 3 * SIZE, requires_grad=True)
    once = torch.randn(1, 1, COUNT, 3, SIZE)
    transposed = torch.randn(SEQUENCE, BATCH, COUNT, 3, SIZE).transpose(0, 1)
    cos, sin = angles(SEQUENCE, ROTATED)
    for qkv in (
        leaf,
        flat.view(BATCH, SEQUENCE, COUNT, 3, SIZE),
        once.expand(BATCH, SEQUENCE, -1, -1, -1),
        transposed,
    ):
        before = qkv.detach().clone()
        found = rotary(qkv, cos, sin, backend="triton")
        assert torch.equal(qkv, before)
        assert_same(found, rotary(qkv, cos, sin, backend="torch"))
        assert len({x.untyped_storage().data_ptr() for x in found}) == 1


def test_in_place_can_be_refused():
    qkv, _ = produced()
    before = qkv.detach().clone()
    rotary(qkv, *angles(SEQUENCE, ROTATED), in_place=False, backend="triton")
    assert torch.equal(qkv, before)


def test_whoever_keeps_the_buffer_for_a_gradient_is_told():
    qkv, _ = produced()
    square = qkv.pow(2).sum()
    rotary(qkv, *angles(SEQUENCE, ROTATED), backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 0, 1)])
def test_gradients_of_outputs_used_once_twice_and_never(used):
    cos, sin = angles(SEQUENCE, ROTATED)
    weights = [torch.randn(BATCH, COUNT, SEQUENCE, SIZE) for _ in used]

    def gradient(backend):
        torch.manual_seed(3)
        qkv, leaf = produced()
        outputs = rotary(qkv, cos, sin, backend=backend)
        sum((outputs[i] * w).sum() for i, w in zip(used, weights, strict=True)).backward()
        return (leaf.grad,)

    assert_same(gradient("triton"), gradient("torch"))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0), (1, 3, 0, 2)])
def test_gradients_of_any_strides(order):
    cos, sin = angles(SEQUENCE, ROTATED)
    dense = torch.randn(3, BATCH, COUNT, SEQUENCE, SIZE)
    strided = [g.permute(order).contiguous().permute([order.index(i) for i in range(4)]) for g in dense]
    found = []
    for upstream in (strided, [g.clone() for g in dense]):
        torch.manual_seed(3)
        qkv, leaf = produced()
        torch.autograd.backward(rotary(qkv, cos, sin, backend="triton"), upstream)
        found.append(leaf.grad)
    assert torch.equal(*found)


class Operators(TorchDispatchMode):
    """Keeps account of what is called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_zeros_are_made_only_for_what_is_not_given():
    qkv, leaf = produced()
    query, key, value = rotary(qkv, *angles(SEQUENCE, ROTATED), backend="triton")
    upstream = [torch.ones_like(x) for x in (query, key, value)]
    for outputs, zeros in (((query, key, value), 0), ((query, key), 1)):
        with Operators() as operators:
            torch.autograd.grad(outputs, leaf, upstream[: len(outputs)], retain_graph=True)
        assert operators.called.count(ASSEMBLE) == 1
        assert operators.called.count(torch.ops.aten.new_zeros.default) == zeros


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("batch", "sequence", "count", "size"), [(2, 3, 3, 32), (3, 41, 1, 16), (1, 5, 70, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_bias_before_it(backend, dtype, batch, sequence, count, size):
    """In fp32, where the parameter says so; the bias itself is not read."""
    qkv, leaf = produced(batch, sequence, count, size, dtype)
    bias = torch.nn.Parameter(torch.full((count * 3 * size,), torch.nan if backend == "triton" else 1.0, dtype=dtype))
    bias.grad_dtype = torch.float32
    outputs = rotary(qkv, *angles(sequence, ROTATED), bias=bias, backend=backend)
    torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
    wanted = leaf.grad.double().sum((0, 1)).flatten()
    assert bias.grad.dtype == (torch.float32 if backend == "triton" else bias.grad.dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_same((bias.grad.double(),), (wanted,), tolerance)


def test_no_sum_for_a_bias_that_wants_none():
    qkv, leaf = produced()
    bias = torch.zeros(COUNT * 3 * SIZE)
    outputs = rotary(qkv, *angles(SEQUENCE, ROTATED), bias=bias, backend="triton")
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert leaf.grad is not None
    assert bias.grad is None


def test_a_gradient_expanded_from_one_number():
    qkv, leaf = produced()
    cos, sin = angles(SEQUENCE, ROTATED)
    sum(x.sum() for x in rotary(qkv, cos, sin, backend="triton")).backward()
    ones = torch.ones_like(leaf)
    assert_same((leaf.grad,), (torch.stack(rotary(ones, cos, -sin, backend="torch"), dim=3).transpose(1, 2),))


class OneBuffer(torch.autograd.Function):
    """Stands for an attention whose gradients lie in one buffer."""

    @staticmethod
    def forward(ctx, query, key, value, buffers):
        ctx.buffers = buffers
        return query + key + value

    @staticmethod
    def backward(ctx, upstream):
        buffer = interleaved(upstream)
        for i, view in enumerate(heads(buffer)):
            view.copy_(upstream * (i + 1))
        hand_over(buffer, ctx)
        ctx.buffers.append(buffer)
        return *heads(buffer), None


@pytest.mark.parametrize(("between", "in_place"), [(lambda x: x, True), (lambda x: x * 1.0, False)])
def test_gradients_that_lie_in_one_buffer_are_rotated_there(between, in_place):
    cos, sin = angles(SEQUENCE, ROTATED)
    buffers, arrived = [], []
    qkv, leaf = produced()
    qkv.register_hook(arrived.append)
    bias = torch.zeros(COUNT * 3 * SIZE, requires_grad=True)
    outputs = rotary(qkv, cos, sin, bias=bias, backend="triton")
    weight = torch.randn(BATCH, COUNT, SEQUENCE, SIZE)
    (OneBuffer.apply(*map(between, outputs), buffers) * weight).sum().backward()
    assert (arrived[0].data_ptr() == buffers[0].data_ptr()) is in_place
    assert_same((bias.grad,), (leaf.grad.sum((0, 1)).flatten(),))

    copy = leaf.detach().requires_grad_()
    query, key, value = rotary(copy, cos, sin, backend="torch")
    ((query + 2 * key + 3 * value) * weight).sum().backward()
    assert_same((leaf.grad,), (copy.grad,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "rotated"), HEAD_AND_ROTARY_SIZES)
@pytest.mark.parametrize(("batch", "sequence", "count", "rows"), [(2, 19, 3, 1), (3, 5, 5, 3), (1, 1, 1, 1)])
def test_a_buffer_turned_back_with_sums(batch, sequence, count, rows, size, rotated, dtype):
    check_back((batch, sequence, count, 3, size), rotated, rows, dtype, torch.device("cpu"))


def test_no_sums_of_no_tokens():
    sums = rotary_back_with_sums(torch.empty(2, 0, 3, 3, 32), *angles(0, 8), torch.bfloat16)
    assert sums.dtype == torch.bfloat16
    assert not sums.any()


def test_one_buffer_with_a_second_use_of_the_query():
    cos, sin = angles(SEQUENCE, ROTATED)
    weight = torch.randn(BATCH, COUNT, SEQUENCE, SIZE)
    qkv, leaf = produced()
    query, key, value = rotary(qkv, cos, sin, backend="triton")
    (OneBuffer.apply(query, key, value, []) * weight + query.pow(2)).sum().backward()
    copy = leaf.detach().requires_grad_()
    query, key, value = rotary(copy, cos, sin, backend="torch")
    ((query + 2 * key + 3 * value) * weight + query.pow(2)).sum().backward()
    assert_same((leaf.grad,), (copy.grad,))


def test_a_buffer_that_only_looks_alike_is_left_alone():
    qkv, leaf = produced()
    given = torch.randn_like(leaf)
    before = given.clone()
    torch.autograd.backward(rotary(qkv, *angles(SEQUENCE, ROTATED), backend="triton"), heads(given))
    assert torch.equal(given, before)
    assert not torch.equal(leaf.grad, given)


class KeepsBoth:
    """A policy that keeps the projection and its rotation."""

    def __call__(self, context, op, *args, **kwargs):
        kept = op in (torch.ops.aten.addmm.default, IN_PLACE) or "scaled_dot_product" in op.name()
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


setattr(KeepsBoth, KEEPS_ROTATION, True)


def keep_both():
    return create_selective_checkpoint_contexts(KeepsBoth(), allow_cache_entry_mutation=True)


@pytest.mark.parametrize(
    "how",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": selective_contexts},
        {"use_reentrant": False, "context_fn": keep_both},
    ],
    ids=["reentrant", "whole", "selective", "selective, rotation kept"],
)
def test_recomputed_in_the_backward_pass(how, layer, x):
    wanted = layer.gradients(lambda x: layer(x, backend="torch"), x)
    assert_same(layer.gradients(lambda x: checkpoint(layer, x, **how), x), wanted)


@pytest.mark.parametrize(("contexts", "rotations"), [(selective_contexts, (0, 2)), (keep_both, (1, 0))])
def test_what_selective_recomputation_copies(contexts, rotations, layer, x):
    """Kept and rotated in place once, or copied with the rotation in each of the two passes."""
    counted = CountCalls()
    with counted:
        layer.gradients(lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts), x)
    gradient = 1
    assert (counted.calls.count(IN_PLACE), counted.calls.count(ASSEMBLE) - gradient) == rotations


class CountCalls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("how", [None, {}, {"context_fn": selective_contexts}], ids=["bare", "whole", "selective"])
def test_compiles_into_one_graph_with_gradients(how, in_place, x):
    layer = Projection(in_place)
    wanted = layer.gradients(lambda x: layer(x, backend="torch"), x)

    def run(x):
        return layer(x) if how is None else checkpoint(layer, x, use_reentrant=False, **how)

    torch._dynamo.reset()
    assert_same(layer.gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), x), wanted)


def test_without_gradients(layer, x):
    with torch.no_grad():
        assert_same((layer(x),), (layer(x, backend="torch"),))
    with torch.inference_mode():
        assert_same((layer(x),), (layer(x, backend="torch"),))


def test_registered_operators_are_what_they_say():
    cos, sin = angles(SEQUENCE, ROTATED)
    qkv = torch.randn(BATCH, SEQUENCE, COUNT, 3, SIZE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(IN_PLACE, (qkv, cos, sin, False), test_utils=checks)
    torch.library.opcheck(ASSEMBLE, (*heads(qkv), cos, sin, True, torch.float32), test_utils=checks)
    torch.library.opcheck(ASSEMBLE, (*heads(qkv), cos, sin, True, None), test_utils=checks)
    torch.library.opcheck(rotary_back_with_sums, (qkv, cos, sin, torch.bfloat16), test_utils=checks)


def test_shapes_alone():
    qkv = torch.empty(2, 5, 4, 3, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) * 1
    angle = torch.empty(1, 5, 4, device="meta")
    outputs = rotary(qkv, angle, angle, backend="triton")
    assert [(*x.shape, x.dtype) for x in outputs] == [(2, 4, 5, 16, torch.bfloat16)] * 3
    sum(x.sum() for x in outputs).backward()


@pytest.mark.parametrize("shape", [(0, 3, 2, 3, 16), (2, 0, 2, 3, 16), (2, 3, 2, 3, 16)])
def test_nothing_to_rotate(shape):
    cos, sin = angles(shape[1], 0 if 0 not in shape else 8)
    qkv = (torch.randn(shape, requires_grad=True)) * 1.0
    before = qkv.detach().clone()
    outputs = rotary(qkv, cos, sin, backend="triton")
    sum(x.sum() for x in outputs).backward()
    assert torch.equal(torch.stack(outputs, dim=3).transpose(1, 2), before)


@pytest.mark.parametrize(
    ("width", "rows", "tile"),
    [
        (16, 32, (4, 32, 16)),
        (10, 64, (2, 64, 16)),
        (128, 16, (1, 16, 128)),
        (256, 71, (1, 8, 256)),
        (4, 2, (256, 2, 4)),
    ],
)
def test_a_program_has_about_two_thousand_elements(width, rows, tile):
    assert rotary_launches.tile(width, rows) == tile


@pytest.mark.parametrize(
    ("launch", "half", "rows", "tile"),
    [
        ((1, 4), 16, 32, (1, 32, 16, 8)),
        ((2, 4), 10, 64, (2, 64, 16, 32)),
        ((1, 8), 8, 24, (1, 32, 8, 4)),
        ((1, 4), 4, 32, (1, 32, 4, 4)),
        ((1, 4), 1, 2, (16, 2, 1, 1)),
        ((2, 4), 16, 256, (2, 64, 16, 32)),
    ],
)
def test_a_program_in_place_has_whole_tokens_and_an_element_for_each_thread(launch, half, rows, tile):
    assert rotary_launches.tile_in_place(rotary_launches.InPlaceLaunch(*launch), half, rows) == tile


def test_shapes_that_do_not_fit_are_named():
    cos, sin = angles(4, 8)
    with pytest.raises(ValueError, match=r"qkv \[2, 3, 2, 3, 16\], cos \[1, 4, 4\] .* wants \[B, S, N, 3, D\]"):
        rotary(torch.randn(2, 3, 2, 3, 16), cos, sin)
    with pytest.raises(ValueError, match=r"bias \[97\] of qkv \[2, 4, 2, 3, 16\]; it wants \[N x 3 x D\]"):
        rotary(torch.randn(2, 4, 2, 3, 16), cos, sin, bias=torch.zeros(97))


def test_the_op_has_a_kernel():
    assert ROTARY.choose("triton", torch.empty(1)) is ROTARY.triton
