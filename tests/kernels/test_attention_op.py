"""Causal attention, and the choice of who computes it. FlashAttention 4 is stood in for by torch."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.compiler import assume_constant_result as constant
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neox_hf.kernels import attention as attention_module
from neox_hf.kernels import attention_backend, causal_attention, rotary
from neox_hf.kernels.attention import check_trains_by_flash_attention_4
from neox_hf.kernels.qkv_gradient import heads
from neox_hf.modeling.recompute import selective_contexts
from tests.kernels.attention_cases import check, scores_of, written_out

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FORWARD = torch.ops.neox_hf.flash_attn_forward.default
BACKWARD = torch.ops.neox_hf.flash_attn_backward.default


class FlashAttention4:
    """The two functions of its interface that are used, on [B, S, N, D], in plain torch."""

    def __init__(self):
        self.gradients = []

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, return_lse):
        assert causal
        assert return_lse
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        log_sum = scores_of(q, k, softmax_scale).logsumexp(-1)
        return written_out(q, k, v, softmax_scale).contiguous(), log_sum, None, None, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, dq, dk, dv):
        assert causal
        assert not deterministic
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        self.gradients.append((dq, dk, dv))
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
        weights = scores_of(q, k, softmax_scale).softmax(-1)
        for_weights = dout @ v.transpose(-1, -2)
        scores = softmax_scale * weights * (for_weights - (for_weights * weights).sum(-1, keepdim=True))
        found = (scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout)
        for into, gradient in zip((dq, dk, dv), found, strict=True):
            into.copy_(gradient.transpose(1, 2))


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention 4, installed and chosen."""
    stand_in = FlashAttention4()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", stand_in)
    monkeypatch.setattr(attention_module, "HEAD_SIZES", (8, 16, 32))
    monkeypatch.setattr(attention_module, "takes_flash_attention_4", lambda *_: True)
    return stand_in


def views(batch=2, sequence=5, count=3, size=16):
    qkv = torch.randn(batch, sequence, count, 3, size)
    return heads(qkv)


def angles(length, rotated):
    t = torch.arange(length)[None, :, None] * 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
    return t.cos(), t.sin()


@pytest.mark.parametrize("size", [16, 80])
def test_follows_the_equation_through_sdpa(assert_follows, size):
    def ours(*inputs):
        return causal_attention(*inputs, scale=0.3)

    assert_follows(ours, lambda *inputs: written_out(*inputs, 0.3), views(size=size), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_no_further_than_written_out(dtype):
    check("cpu", dtype, batch=2, sequence=65, count=2, size=32)


def test_follows_the_equation_through_flash_attention(assert_follows, flash):
    def ours(*inputs):
        return causal_attention(*inputs, scale=0.3)

    assert_follows(ours, lambda *inputs: written_out(*inputs, 0.3), views(), 1e-5)
    assert len(flash.gradients) == 1


def test_the_output_is_contiguous():
    output = causal_attention(*views(), scale=1.0)
    assert output.shape == (2, 5, 3, 16)
    assert output.is_contiguous()


@pytest.mark.parametrize("between", [lambda x: x, lambda x: x * 1.0], ids=["at once", "operation between"])
def test_gradients_go_back_in_one_buffer(between, flash):
    cos, sin = angles(5, 8)
    leaf = torch.randn(2, 5, 3, 3, 16, requires_grad=True)
    arrived = []
    qkv = leaf * 1.0
    qkv.register_hook(arrived.append)
    query, key, value = rotary(qkv, cos, sin, backend="triton")
    causal_attention(between(query), between(key), between(value), scale=0.3).pow(2).sum().backward()
    dq, dk, dv = flash.gradients[0]
    assert dq.stride() == dk.stride() == dv.stride() == (5 * 3 * 3 * 16, 3 * 3 * 16, 3 * 16, 1)
    assert [x.storage_offset() for x in (dq, dk, dv)] == [0, 16, 32]
    assert (arrived[0].data_ptr() == dq.data_ptr()) is (between(query) is query)

    copy = leaf.detach().requires_grad_()
    written_out(*rotary(copy, cos, sin, backend="torch"), 0.3).pow(2).sum().backward()
    assert torch.allclose(leaf.grad, copy.grad, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"context_fn": selective_contexts}], ids=["whole", "selective"])
def test_is_kept_by_selective_recomputation(how, flash, monkeypatch):
    calls = []
    forward = flash._flash_attn_fwd
    monkeypatch.setattr(flash, "_flash_attn_fwd", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    inputs = [x.clone().requires_grad_() for x in views()]
    checkpoint(lambda *x: causal_attention(*x, scale=0.3), *inputs, use_reentrant=False, **how).sum().backward()
    assert len(calls) == (1 if how else 2)


@pytest.mark.parametrize("installed", [False, True])
def test_compiles_into_one_graph(installed, request):
    if installed:
        request.getfixturevalue("flash")
    cos, sin = angles(5, 8)

    def attend(leaf):
        return causal_attention(*rotary(leaf * 1.0, cos, sin, backend="triton"), scale=0.3)

    leaf = torch.randn(2, 5, 3, 3, 16, requires_grad=True)
    attend(leaf).pow(2).sum().backward()
    wanted, leaf.grad = leaf.grad, None
    torch._dynamo.reset()
    torch.compile(attend, fullgraph=True, backend="aot_eager")(leaf).pow(2).sum().backward()
    assert torch.allclose(leaf.grad, wanted, atol=1e-5)


def test_registered_operators_are_what_they_say(flash):
    query, key, value = views()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD, (query, key, value, 0.3), test_utils=checks)
    output, log_sum = FORWARD(query, key, value, 0.3)
    torch.library.opcheck(BACKWARD, (output, query, key, value, output, log_sum, 0.3), test_utils=checks)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"backend": "torch"}])
def test_flash_attention_is_left_out(kwargs, flash):
    inputs = [x.clone().requires_grad_() for x in views()]
    causal_attention(*inputs, scale=0.3, **kwargs).sum().backward()
    assert flash.gradients == []


def test_dropout_drops():
    query, key, _ = views()
    ones = torch.ones_like(query)
    assert torch.allclose(causal_attention(query, key, ones, scale=1.0), torch.ones(()))
    assert causal_attention(query, key, ones, scale=1.0, dropout=0.5).std() > 0.1


def test_nothing_to_attend_to(flash):
    query = torch.empty(0, 3, 5, 16)
    assert causal_attention(query, query, query, scale=1.0).shape == (0, 5, 3, 16)


@pytest.mark.parametrize(
    ("size", "dtype", "device", "capability", "installed", "wanted"),
    [
        (64, torch.bfloat16, CUDA, (9, 0), True, "flash_attention_4"),
        (128, torch.float16, CUDA, (9, 0), True, "flash_attention_4"),
        (80, torch.bfloat16, CUDA, (9, 0), True, "sdpa"),
        (96, torch.bfloat16, CUDA, (9, 0), True, "sdpa"),
        (64, torch.float32, CUDA, (9, 0), True, "sdpa"),
        (64, torch.bfloat16, CUDA, (8, 0), True, "sdpa"),
        (64, torch.bfloat16, CUDA, (10, 0), True, "sdpa"),
        (64, torch.bfloat16, CUDA, (9, 0), False, "sdpa"),
        (64, torch.bfloat16, torch.device("cpu"), None, True, "sdpa"),
    ],
)
def test_who_computes_it(size, dtype, device, capability, installed, wanted, monkeypatch):
    monkeypatch.setattr(attention_module, "has_flash_attention_4", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_backend(size, dtype, device) == wanted


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [("flash-attn-4", "4.0.0b36", True), ("flash-attn-4", "4.0.0", False), ("another", "4.0.0b36", False)],
)
def test_installed_is_asked_of_the_distribution(name, found, wanted, monkeypatch):
    def version(asked):
        if asked != name:
            raise attention_module.importlib.metadata.PackageNotFoundError(asked)
        return found

    monkeypatch.setattr(attention_module.importlib.metadata, "version", version)
    assert attention_module.has_flash_attention_4.__wrapped__() is wanted


def test_gradients_that_are_wrong_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_trains_by_flash_attention_4(64, CUDA)
    check_trains_by_flash_attention_4(80, CPU)
    with pytest.raises(ValueError, match="'flash_attention_4' has wrong gradients for heads of 80"):
        check_trains_by_flash_attention_4(80, CUDA)


def test_shapes_that_differ_are_refused():
    query, key, value = views()
    with pytest.raises(ValueError, match=r"query \[2, 3, 1, 16\], key \[2, 3, 5, 16\] and value .* with a cache"):
        causal_attention(query[:, :, :1], key, value, scale=1.0)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="kernels='cuda' is unknown; choose one of auto, triton, torch"):
        causal_attention(*views(), scale=1.0, backend="cuda")


def test_agrees_with_sdpa_told_nothing_else():
    query, key, value = views()
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2).transpose(1, 2)
    assert torch.equal(causal_attention(query, key, value, scale=0.2), wanted)


@pytest.mark.parametrize("checked", [(), (64,)])
def test_compiles_for_any_head_size(checked, monkeypatch):
    """Whatever size is asked about, one at a time; nothing that is asked becomes a guard."""
    asked = []
    monkeypatch.setattr(attention_module, "HEAD_SIZES", checked)
    monkeypatch.setattr(attention_module, "takes_flash_attention_4", constant(lambda size, *_: asked.append(size)))
    torch._dynamo.reset()
    attend = torch.compile(
        lambda q: causal_attention(q, q, q, scale=1.0).sum(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (32, 64):
        assert attend(torch.ones(1, 2, 8, size)) == 2 * 8 * size
    assert set(asked) == set(checked)
