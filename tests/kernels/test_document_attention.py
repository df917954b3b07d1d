"""Attention within documents and beside padding, by kernels in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from neox_hf.kernels import document_attention, document_attention_forward, rotary, takes_documents
from neox_hf.kernels.document_attention_backward import KEY_VALUE_GRADIENT, QUERY_GRADIENT
from neox_hf.kernels.document_attention_blocks import SMALLEST
from neox_hf.kernels.qkv_gradient import heads
from neox_hf.modeling.recompute import selective_contexts
from tests.kernels.document_cases import KINDS, check, spans_and_seen, within, written_out

FORWARD = torch.ops.neox_hf.document_attn_forward.default
BACKWARD = torch.ops.neox_hf.document_attn_backward.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_equation(kind, dtype):
    # The interpreter cuts bf16 off, where torch rounds.
    tolerance = 2.2 if dtype == torch.bfloat16 else 1.05
    check("cpu", dtype, kind, batch=2, sequence=150, count=2, size=16, tolerance=tolerance)


@pytest.mark.parametrize("size", [8, 20, 80])
@pytest.mark.parametrize("sequence", [3, 64, 65])
def test_over_odd_sizes(sequence, size):
    check("cpu", torch.float32, "documents", batch=2, sequence=sequence, count=1, size=size)
    check("cpu", torch.float32, "holes", batch=2, sequence=sequence, count=1, size=size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_does(kind, assert_follows):
    spans, seen = spans_and_seen(kind, 2, 30, "cpu")
    inputs = [torch.randn(2, 3, 30, 8) for _ in range(3)]
    ours, truth = within(spans, "torch"), written_out(seen)
    assert_follows(lambda *x: ours(*x, 0.3), lambda *x: truth(*x, 0.3), inputs, 1e-5)


def test_what_sees_nothing_has_zeros():
    spans, _ = spans_and_seen("holes", 2, 30, "cpu")
    spans = spans._replace(kept=spans.kept & (torch.arange(30) > 3))
    query, key, value = torch.randn(3, 2, 3, 30, 8).unbind()
    for backend in ("torch", "triton"):
        output = document_attention(query, key, value, spans, scale=1.0, backend=backend)
        assert (output[:, :4] == 0).all()
        assert output.isfinite().all()


def test_inputs_of_any_strides():
    spans, _ = spans_and_seen("documents", 2, 40, "cpu")
    query, key, value = torch.randn(3, 2, 3, 40, 8).unbind()
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    results = []
    for inputs in ((query, key, value), strided):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = document_attention(*leaves, spans, scale=0.3, backend="triton")
        output.sum().backward()  # of a sum comes one element expanded over all
        results.append((output, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_spans_of_any_strides():
    spans, _ = spans_and_seen("holes", 2, 40, "cpu")
    strided = type(spans)(*(places.t().contiguous().t() for places in spans))
    query, key, value = torch.randn(3, 2, 3, 40, 8).unbind()
    a, b = (document_attention(query, key, value, each, scale=0.3, backend="triton") for each in (spans, strided))
    assert torch.equal(a, b)


def test_dropout_drops():
    spans, _ = spans_and_seen("documents", 2, 40, "cpu")
    query, key, _ = torch.randn(3, 2, 3, 40, 8).unbind()
    ones = torch.ones_like(query)
    assert torch.allclose(document_attention(query, key, ones, spans, scale=1.0, backend="triton"), torch.ones(()))
    assert document_attention(query, key, ones, spans, scale=1.0, dropout=0.5, backend="triton").std() > 0.1


def test_gradients_go_back_in_one_buffer():
    spans, _ = spans_and_seen("documents", 2, 20, "cpu")
    angles = torch.rand(2, 1, 20, 4)
    leaf = torch.randn(2, 20, 3, 3, 16, requires_grad=True)
    gradients = {}
    for backend in ("triton", "torch"):
        parts = rotary(leaf * 1.0, *angles, backend=backend)
        document_attention(*parts, spans, scale=0.3, backend=backend).pow(2).sum().backward()
        gradients[backend], leaf.grad = leaf.grad, None
    torch.testing.assert_close(gradients["triton"], gradients["torch"])


@pytest.mark.parametrize("how", [{}, {"context_fn": selective_contexts}], ids=["whole", "selective"])
def test_is_kept_by_selective_recomputation(how, monkeypatch):
    spans, _ = spans_and_seen("documents", 2, 20, "cpu")
    inputs = [torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3)]
    kernel, calls = document_attention_forward._forward_kernel, []

    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return kernel[grid]

    monkeypatch.setattr(document_attention_forward, "_forward_kernel", Counted())
    attend = within(spans)
    checkpoint(lambda *x: attend(*x, 0.3), *inputs, use_reentrant=False, **how).sum().backward()
    assert len(calls) == (1 if how else 2)


def test_compiles_into_one_graph():
    spans, _ = spans_and_seen("documents", 2, 20, "cpu")

    def attend(leaf):
        return document_attention(*heads(leaf * 1.0), spans, scale=0.3, backend="triton")

    leaf = torch.randn(2, 20, 3, 3, 16, requires_grad=True)
    attend(leaf).pow(2).sum().backward()
    wanted, leaf.grad = leaf.grad, None
    torch._dynamo.reset()
    torch.compile(attend, fullgraph=True, backend="aot_eager")(leaf).pow(2).sum().backward()
    assert torch.allclose(leaf.grad, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["documents", "holes"])
def test_registered_operators_are_what_they_say(kind):
    (first, behind, end, kept), _ = spans_and_seen(kind, 2, 20, "cpu")
    query, key, value = heads(torch.randn(2, 20, 3, 3, 16))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD, (query, key, value, first, behind, kept, 0.3), test_utils=checks)
    output, log_sum = FORWARD(query, key, value, first, behind, kept, 0.3)
    inputs = (torch.ones_like(output), query, key, value, first, behind, end, kept, output, log_sum, 0.3)
    torch.library.opcheck(BACKWARD, inputs, test_utils=checks)


def test_nothing_to_attend_to():
    spans, _ = spans_and_seen("documents", 2, 20, "cpu")
    query = torch.empty(2, 0, 20, 16, requires_grad=True)
    output = document_attention(query, query, query, spans, scale=1.0, backend="triton")
    assert output.shape == (2, 20, 0, 16)
    output.sum().backward()


def test_arguments_that_do_not_fit_are_refused():
    spans, _ = spans_and_seen("documents", 2, 20, "cpu")
    query, key, value = torch.randn(3, 2, 3, 20, 8).unbind()
    with pytest.raises(ValueError, match=r"query \[2, 3, 1, 8\], key .* and spans \[2, 20\]; it wants three of one"):
        document_attention(query[:, :, :1], key, value, spans, scale=1.0)
    with pytest.raises(ValueError, match=r"spans \[1, 20\]"):
        document_attention(query, key, value, spans._replace(first=spans.first[:1]), scale=1.0)
    with pytest.raises(ValueError, match=r"scale=0\.0; it wants one above 0"):
        document_attention(query, key, value, spans, scale=0.0)
    with pytest.raises(ValueError, match="kernels='cuda' is unknown"):
        document_attention(query, key, value, spans, scale=1.0, backend="cuda")


@pytest.mark.parametrize(
    ("capability", "hip", "size", "wanted"),
    [
        ((9, 0), None, 128, True),
        ((8, 0), None, 256, True),
        ((7, 5), None, 64, False),
        ((9, 4), "6.4", 64, False),
        ((9, 0), None, 512, False),
    ],
)
def test_what_it_is_for(capability, hip, size, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    x, many = (
        SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(samples, 8, 64))
        for samples in (65_535, 65_536)
    )
    assert takes_documents("auto", x, size) is wanted
    assert not takes_documents("torch", x, size)
    assert not takes_documents("auto", torch.zeros(1), size)
    assert not takes_documents("auto", many, size)


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_blocks_fit_into_shared_memory(width, element_size, kilobytes):
    """Those of a consumer's card, of Ampere and of Hopper; what does not fit at all is as small as can be."""
    for choice, held, loaded in (
        (document_attention_forward.FORWARD, lambda x: x.queries, lambda x: 2 * x.keys),
        (QUERY_GRADIENT, lambda x: 2 * x.queries, lambda x: 2 * x.keys),
        (KEY_VALUE_GRADIENT, lambda x: 2 * x.keys, lambda x: 2 * x.queries),
    ):
        launches = choice.candidates(width, element_size, kilobytes)
        assert launches
        for launch in launches:
            taken = (held(launch) + launch.stages * loaded(launch)) * width * element_size
            assert taken < 1024 * kilobytes or launches == (SMALLEST,)
            assert launch.stages >= 1
