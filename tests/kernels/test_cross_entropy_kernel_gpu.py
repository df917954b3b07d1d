"""The Triton halves of the loss ops on a GPU: no further from fp64 than torch is in the same dtype; memory; capture."""

import pytest
import torch
from torch.nn import functional as F

from neox_hf.kernels import cross_entropy, linear_cross_entropy
from neox_hf.kernels.softmax_rows import losses_and_gradient_
from tests.kernels.head_and_loss import SimulatedRanks, over_ranks, with_gradients

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def labels_of(tokens, vocabulary):
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    labels[3::7] = IGNORED
    return labels


def no_further(ours, torchs, exact, name, tiny=1e-6):
    """Of tensors that differ from `exact` by rounding."""
    error, theirs, size = ((x.double() - y).norm() for x, y in ((ours, exact), (torchs, exact), (exact, 0)))
    assert error <= 1.05 * theirs + tiny * size, f"{name}: {error:.3e}, torch {theirs:.3e}, of {size:.3e}"


# As trained; no multiple of 16, or of anything; a row of one tile; fewer words than a vector; more rows than programs.
@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(64, 50304), (64, 50257), (33, 50432), (65, 8192), (7, 5), (3000, 1000), (9, 256000)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_loss_of_logits(tokens, vocabulary, dtype, z_loss):
    logits = (torch.randn(1, tokens, vocabulary, device="cuda") * 4).to(dtype)
    labels = labels_of(tokens, vocabulary)[None]

    def run(x, backend):
        x = x.clone().requires_grad_()
        loss = cross_entropy(x, None, shift_labels=labels, z_loss=z_loss, num_items_in_batch=50, backend=backend)
        loss.backward()
        return loss.detach(), x.grad

    ours, torchs, exact = run(logits, "triton"), run(logits, "torch"), run(logits.double(), "torch")
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, dtype)
    for name, *tensors in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        no_further(*tensors, name)
    assert not ours[1][labels == IGNORED].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 4.0, 40.0])
@pytest.mark.parametrize(("words", "columns"), [(50257, 50304), (50304, 50304), (1000, 1024), (40000, 50304)])
def test_rows_in_place(dtype, spread, words, columns):
    rows = 700  # several for each program
    logits = (torch.randn(rows, columns, device="cuda") * spread).to(dtype)
    logits[:, words:] = torch.nan
    labels = labels_of(rows, words)
    exact = logits[:, :words].double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="none")
    wanted.sum().backward()
    lower = logits[:, :words].clone().requires_grad_()
    torchs = F.cross_entropy(lower.float(), labels, reduction="none")
    torchs.sum().backward()
    losses = torch.full((rows,), torch.nan, device="cuda")
    losses_and_gradient_(logits, labels, losses, words=words, ignore_index=IGNORED)
    no_further(losses, torchs.detach(), wanted.detach(), "losses")
    no_further(logits[:, :words], lower.grad, exact.grad, "gradient")
    assert not logits[:, words:].any(), "padding got a gradient"
    assert not logits[labels == IGNORED].any()


def head(dtype, tokens=300, hidden=128, vocabulary=1001, spread=4.0):
    weight = torch.randn(vocabulary, hidden, device="cuda") * spread / hidden**0.5
    return torch.randn(tokens, hidden, device="cuda").to(dtype), weight.to(dtype), labels_of(tokens, vocabulary)


def by_torch(hidden, weight, labels):
    return F.cross_entropy(
        (hidden @ weight.t()).to(torch.promote_types(weight.dtype, torch.float32)), labels, reduction="sum"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 4.0, 12.0])
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "chunk"),
    [(300, 128, 1001, 64), (300, 80, 1008, None), (1, 64, 50257, None), (4500, 256, 50304, None)],
)
def test_head_and_loss(dtype, spread, tokens, hidden, vocabulary, chunk):
    data = head(dtype, tokens, hidden, vocabulary, spread)
    ours = with_gradients(linear_cross_entropy, *data, chunk=chunk, backend="triton")
    torchs = with_gradients(by_torch, *data)
    exact = with_gradients(by_torch, data[0].double(), data[1].double(), data[2])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    # Each rounding of a logit moves the one number, either way; a statistic kept in half precision would by 1e-3.
    half = dtype != torch.float32
    no_further(ours[0], torchs[0], exact[0], "loss", tiny=1e-4 if half else 1e-6)
    for name, *tensors in zip(("of hidden", "of weight"), ours[1:], torchs[1:], exact[1:], strict=True):
        no_further(*tensors, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_gradient_of_the_weight_and_a_buffer_agree(dtype):
    hidden, weight, labels = head(dtype)
    exact = with_gradients(by_torch, hidden.double(), weight.double(), labels, upstream=0.25)[2]
    torchs = with_gradients(by_torch, hidden, weight, labels, upstream=0.25)[2]
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = torch.float32
    (linear_cross_entropy(hidden, weight, labels, chunk=64, backend="triton") / 4).backward()
    assert weight.grad.dtype == torch.float32
    # Most of the error is that of logits in half precision (0.0048 of the gradient in bf16), which torch's are as well.
    no_further(weight.grad, torchs, exact, "of weight")
    buffer, own = torch.ones_like(weight.grad), weight.grad
    weight.grad = None
    options = {"upstream": 0.25, "accumulate_into": buffer, "chunk": 64, "backend": "triton"}
    (linear_cross_entropy(hidden, weight, labels, **options) / 4).backward()
    assert weight.grad is None
    assert (buffer - 1 - own).norm() <= 1e-5 * own.norm() + 1e-7 * buffer.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("brought", [0.3, 0.15, 0.7, 1e-4])
def test_an_expected_upstream(dtype, brought):
    """What comes is what was expected, half of it, or anything: then one more rounding of what is in half precision."""
    data = head(dtype)
    found = with_gradients(linear_cross_entropy, *data, upstream=brought, promise=0.3, chunk=64, backend="triton")
    torchs = with_gradients(by_torch, *data, upstream=brought)
    exact = with_gradients(by_torch, data[0].double(), data[1].double(), data[2], upstream=brought)
    more = 0.0 if brought in (0.3, 0.15) else torch.finfo(dtype).eps / 2
    for name, *tensors in zip(("of hidden", "of weight"), found[1:], torchs[1:], exact[1:], strict=True):
        no_further(*tensors, name, tiny=1e-6 + more)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_together(size, dtype):
    hidden, weight, labels = head(dtype, tokens=130)
    share = -(-weight.shape[0] // size) + 7
    options = {"chunk": 64, "z_loss": 1e-3}
    found = over_ranks(SimulatedRanks(size), hidden, weight, labels, share, backend="triton", **options)
    losses, for_hidden, for_weight = zip(*found, strict=True)
    exact = with_gradients(linear_cross_entropy, hidden.double(), weight.double(), labels, z_loss=1e-3)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    together = (losses[0], sum(x.double() for x in for_hidden), torch.cat(for_weight)[: weight.shape[0]])
    for ours, truth in zip(together, exact, strict=True):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()
    assert not torch.cat(for_weight)[weight.shape[0] :].any()


@pytest.mark.parametrize("wide", [False, True])
def test_extra_memory(wide):
    """Beyond the inputs and the two gradients, at the shapes of a 1.4B model: at most 0.6 GiB."""
    hidden, weight, labels = head(torch.bfloat16, 16384, 2048, 50304)
    hidden, weight = hidden.requires_grad_(), torch.nn.Parameter(weight)
    if wide:
        weight.grad_dtype = torch.float32
    _ = hidden[:128] @ weight[:128].t()  # the library's own workspace, which stays
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, upstream=1.0, backend="triton").backward()
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before - gradients <= 0.6 * 2**30


def test_repeats_exactly():
    data = head(torch.bfloat16, 4500, 256, 50304)
    first, again = (with_gradients(linear_cross_entropy, *data, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_waits_for_the_device():
    hidden, weight, labels = head(torch.bfloat16)
    with_gradients(linear_cross_entropy, hidden, weight, labels, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(linear_cross_entropy, hidden, weight, labels, promise=1.0, backend="triton")
        logits = (hidden @ weight.t())[None].requires_grad_()
        cross_entropy(logits, None, shift_labels=labels[None], backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph():
    hidden, weight, labels = head(torch.bfloat16)
    hidden.requires_grad_()
    buffer = torch.zeros(weight.shape, device="cuda")
    weight.requires_grad_()

    def step():
        loss = linear_cross_entropy(
            hidden, weight, labels, upstream=1.0, accumulate_into=buffer, chunk=128, backend="triton"
        )
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = step()
    torch.cuda.current_stream().wait_stream(side)
    once = buffer.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    buffer.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip((*found, buffer), (*wanted, once), strict=True))


def test_a_compiler_takes_the_whole_head():
    hidden, weight, labels = head(torch.bfloat16)
    wanted = with_gradients(linear_cross_entropy, hidden, weight, labels, backend="triton")
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    found = with_gradients(compiled, hidden, weight, labels, backend="triton")
    torch._dynamo.reset()
    for ours, eager in zip(found, wanted, strict=True):
        assert (ours.double() - eager.double()).norm() <= 1e-2 * eager.double().norm()
