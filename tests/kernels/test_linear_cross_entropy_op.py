"""The head and its loss in one op: against whole logits, against fp64, in chunks, over ranks."""

import random
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from neox_hf.kernels import linear_cross_entropy
from neox_hf.kernels.chunked_losses import CHUNK_MULTIPLE, KERNEL_BYTES_AT_ONCE, LOGITS_AT_ONCE, default_chunk
from tests.kernels.head_and_loss import (
    HIDDEN,
    VOCABULARY,
    SimulatedRanks,
    assert_all_close,
    inputs,
    on_whole_logits,
    over_ranks,
    with_gradients,
)


@pytest.mark.parametrize("chunk", [1, 2, 5, 18, 36, 37, 38, 128, None])
def test_equals_the_loss_of_whole_logits_for_every_chunk(chunk):
    data = inputs()
    found = with_gradients(linear_cross_entropy, *data, upstream=0.25, chunk=chunk)
    assert_all_close(found, with_gradients(on_whole_logits, *data, upstream=0.25), 2e-6)


def test_follows_the_equation(assert_follows):
    hidden, weight, labels = inputs()

    def written_out(h, w):
        losses = [((w @ h[i]).exp().sum().log() - w[y] @ h[i]) for i, y in enumerate(labels.tolist()) if y != -100]
        return torch.stack(losses).sum()

    assert_follows(lambda h, w: linear_cross_entropy(h, w, labels, chunk=8), written_out, (hidden, weight), 2e-6)


@pytest.mark.parametrize("chunk", [4, None])
def test_gradcheck_in_double_precision(chunk):
    hidden, weight, labels = inputs(torch.float64, tokens=9, vocabulary=7)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    assert loss.dtype == torch.float64
    arguments = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, chunk=chunk), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 4.0, 12.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_is_no_further_from_the_truth_than_torch(dtype, spread, device):
    data = [x.to(device) for x in inputs(dtype, tokens=300, vocabulary=101, spread=spread)]
    errors = torch.zeros(2, 3, dtype=torch.float64)
    # Factors of a whole power of two: how far a product is rounded depends on where in it the factor lies.
    for upstream in (1.0, 0.9, 0.8, 0.7, 0.6):
        found = with_gradients(linear_cross_entropy, *data, upstream=upstream, chunk=64)
        stock = with_gradients(on_whole_logits, *data, upstream=upstream)
        truth = with_gradients(on_whole_logits, *(x.double() for x in data[:2]), data[2], upstream=upstream)
        assert found[0].dtype == torch.float32
        assert [x.dtype for x in found[1:]] == [dtype, dtype]
        for place, results in enumerate(zip(found, stock, truth, strict=True)):
            ours, theirs, exact = (x.double() for x in results)
            errors[:, place] += torch.stack(
                [(x - exact).square().sum() / exact.square().sum() for x in (ours, theirs)]
            ).cpu()
    ours, theirs = errors.sqrt()
    assert (ours <= 1.02 * theirs + 2e-7).all()


def test_a_weight_with_wider_gradients_gets_them_unrounded_and_adds_them_up():
    hidden, weight, labels = inputs(torch.bfloat16)
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = torch.float32
    linear_cross_entropy(hidden, weight, labels).backward()
    once = weight.grad.clone()
    assert once.dtype == torch.float32
    assert not torch.equal(once, once.bfloat16().float())
    linear_cross_entropy(hidden, weight, labels).backward()
    assert torch.equal(weight.grad, 2 * once)


def test_any_gradient_dtype_means_the_precise_one():
    hidden, weight, labels = inputs(torch.bfloat16)
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = None
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad.dtype == torch.float32


def test_the_upstream_factor_is_not_rounded_to_half_precision():
    # 1/3 in bf16 is off by 0.1 %, the same way in every element.
    hidden, weight, labels = inputs(torch.bfloat16, tokens=256)
    _, whole, _ = with_gradients(linear_cross_entropy, hidden, weight, labels)
    _, third, _ = with_gradients(linear_cross_entropy, hidden, weight, labels, upstream=1 / 3)
    counted = whole != 0
    ratio = (third.double()[counted] / whole.double()[counted]).mean()
    assert ratio.item() == pytest.approx(1 / 3, rel=3e-4)


@pytest.mark.parametrize("upstream", [1.0, 0.0])
def test_no_label_at_all_gives_zero_and_not_nan(upstream):
    hidden, weight, labels = inputs()
    loss, *gradients = with_gradients(
        linear_cross_entropy, hidden, weight, torch.full_like(labels, -100), upstream=upstream, chunk=8
    )
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_what_an_ignored_token_holds_reaches_nothing():
    hidden, weight, labels = inputs()
    wanted = with_gradients(linear_cross_entropy, hidden, weight, labels)
    hidden[4] = torch.inf
    for found, expected in zip(with_gradients(linear_cross_entropy, hidden, weight, labels), wanted, strict=True):
        assert torch.equal(found, expected)


def test_other_ignore_index():
    hidden, weight, labels = inputs()
    other = labels.masked_fill(labels == -100, 5)
    assert torch.equal(
        linear_cross_entropy(hidden, weight, other, ignore_index=5),
        linear_cross_entropy(hidden, weight, other.masked_fill(other == 5, -100)),
    )


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    hidden, weight, labels = inputs()
    labels[0] = label
    assert linear_cross_entropy(hidden, weight, labels).isnan()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted_is_made(frozen):
    hidden, weight, labels = inputs()
    _, for_hidden, for_weight = with_gradients(linear_cross_entropy, hidden, weight, labels)
    if frozen == "hidden":
        weight.requires_grad_()
    else:
        hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert torch.equal(weight.grad, for_weight) if frozen == "hidden" else torch.equal(hidden.grad, for_hidden)


def test_autocast_multiplies_in_its_dtype_and_keeps_fp32_gradients():
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(linear_cross_entropy, hidden, weight, labels)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, labels), found[0])
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert_all_close(found, with_gradients(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), labels), 4e-3)


def test_empty_input():
    loss, for_hidden, for_weight = with_gradients(
        linear_cross_entropy, torch.zeros(0, HIDDEN), torch.ones(5, HIDDEN), torch.zeros(0, dtype=torch.int64)
    )
    assert (loss.item(), for_hidden.shape, for_weight.any().item()) == (0.0, (0, HIDDEN), False)


class LargestTensor(TorchDispatchMode):
    """Watches every operation; `elements` of the largest result, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            counts = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            self.elements = max(self.elements, tensor.numel() if counts else 0)
        return result


@pytest.fixture
def largest(monkeypatch):
    """Watches inside the op, which is one operation seen from outside."""
    mode, module = LargestTensor(), import_module("neox_hf.kernels.linear_cross_entropy")

    def watched(function):
        def watching(*arguments):
            with mode:
                return function(*arguments)

        return watching

    for name in ("chunked_losses", "kernel_losses"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return mode


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_larger_than_a_chunk_of_logits_and_no_product_runs_twice(largest, backend):
    hidden, weight, labels = inputs(tokens=80, vocabulary=64)
    with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=20, backend=backend)
    assert largest.elements == 20 * 64
    assert largest.products == 3 * 4


def test_four_chunks_of_the_models_we_train():
    assert default_chunk(16384, 50304, KERNEL_BYTES_AT_ONCE // 2) == 4096


@pytest.mark.gpu
def test_memory_on_a_cuda_device():
    hidden, weight, labels = (x.cuda() for x in inputs(torch.bfloat16, tokens=8192, vocabulary=50304))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, backend="torch").backward()
    assert torch.cuda.max_memory_allocated() - before < 13 * LOGITS_AT_ONCE + 10 * weight.numel()


def test_no_logits_are_kept_for_the_backward_pass():
    kept = []
    hidden, weight, labels = inputs(tokens=512, vocabulary=640)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, chunk=128)
    assert sorted(kept) == sorted([hidden.shape, weight.shape])


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_evaluation_makes_no_gradient(largest, grad):
    hidden, weight, labels = inputs()
    wanted = linear_cross_entropy(hidden, weight, labels, chunk=10)
    largest.products = 0
    with grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, chunk=10)
    assert largest.products == 4
    assert torch.equal(loss, wanted)
    assert not loss.requires_grad


@pytest.mark.parametrize(("tokens", "rows"), [(1, 10), (8192, 50304), (16384, 50304), (8192, 25216), (5000, 2**27)])
@pytest.mark.parametrize("at_once", [LOGITS_AT_ONCE, KERNEL_BYTES_AT_ONCE // 2])
def test_default_chunk(tokens, rows, at_once):
    chunk = default_chunk(tokens, rows, at_once)
    assert chunk % CHUNK_MULTIPLE == 0
    assert chunk * rows <= at_once or chunk == CHUNK_MULTIPLE
    pieces = -(-tokens // chunk)
    assert pieces * chunk - tokens < CHUNK_MULTIPLE * pieces, "chunks of unequal size waste the last product"


@pytest.mark.parametrize(("size", "share_rows"), [(2, 15), (4, 8), (2, 20), (3, 15), (4, 29), (1, 32)])
@pytest.mark.parametrize("chunk", [10, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_together_equal_the_whole(size, share_rows, chunk, dtype):
    hidden, weight, labels = inputs(dtype)
    ranks = SimulatedRanks(size)
    found = over_ranks(ranks, hidden, weight, labels, share_rows, chunk=chunk, upstream=0.5)
    losses, for_hidden, for_weight = zip(*found, strict=True)
    together = (losses[0], sum(for_hidden), torch.cat(for_weight)[:VOCABULARY])
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    assert_all_close(together, with_gradients(linear_cross_entropy, hidden, weight, labels, upstream=0.5), tolerance)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert not torch.cat(for_weight)[VOCABULARY:].any(), "padding got a gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_in_half_precision_with_a_rank_of_padding_alone(dtype):
    hidden, weight, labels = inputs(dtype)
    found = over_ranks(SimulatedRanks(3), hidden, weight, labels, 15)
    losses, for_hidden, for_weight = zip(*found, strict=True)
    together = (losses[0], sum(x.float() for x in for_hidden), torch.cat(for_weight)[:VOCABULARY])
    assert_all_close(together, with_gradients(linear_cross_entropy, hidden, weight, labels), 2e-2)
    assert not for_hidden[2].any()
    assert not for_weight[2].any()


def test_padding_without_ranks():
    hidden, weight, labels = inputs()
    padded = F.pad(weight, (0, 0, 0, 3), value=50.0)
    loss, for_hidden, for_weight = with_gradients(linear_cross_entropy, hidden, padded, labels, rows=VOCABULARY)
    wanted = with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert_all_close((loss, for_hidden, for_weight[:VOCABULARY]), wanted, 1e-6)
    assert not for_weight[VOCABULARY:].any()


@pytest.mark.parametrize("everything_ignored", [False, True])
def test_every_rank_reduces_twice_a_chunk_whatever_its_labels(everything_ignored):
    hidden, weight, labels = inputs()
    labels = torch.full_like(labels, -100) if everything_ignored else labels.clamp(max=10)  # all on the first rank
    ranks = SimulatedRanks(2)
    found = over_ranks(ranks, hidden, weight, labels, 15, chunk=10)
    chunks = [10, 10, 10, 7]
    assert ranks.calls[0] == ranks.calls[1] == [call for n in chunks for call in (("max", (n, 1)), ("sum", (n, 3)))]
    assert all(loss.isfinite() for loss, _, _ in found)
    assert (found[0][0].item() == 0) == everything_ignored


def test_a_label_that_no_rank_holds_gives_nan_on_every_rank():
    hidden, weight, labels = inputs()
    labels[0] = VOCABULARY  # a row of padding of the last rank
    assert all(loss.isnan() for loss, _, _ in over_ranks(SimulatedRanks(2), hidden, weight, labels, 16))


def test_repeats_exactly():
    data = inputs()
    first = over_ranks(SimulatedRanks(2), *data, 16, chunk=10)
    again = over_ranks(SimulatedRanks(2), *data, 16, chunk=10)
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_any_sizes_ranks_chunks_and_labels(seed):
    """Drawn at random; the truth is the loss of whole logits in fp64."""
    draw = random.Random(seed)
    size, share_rows, tokens = draw.randint(1, 5), draw.randint(1, 40), draw.randint(1, 90)
    vocabulary = draw.randint(1, size * share_rows)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64) * 10 ** draw.uniform(-3, 1)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < draw.choice([0, 0.3, 1])] = -100
    options = {"chunk": draw.choice([None, draw.randint(1, tokens)]), "upstream": draw.uniform(-2, 2)}
    losses, for_hidden, for_weight = zip(
        *over_ranks(SimulatedRanks(size), hidden, weight, labels, share_rows, **options), strict=True
    )
    wanted = with_gradients(on_whole_logits, hidden, weight, labels, upstream=options["upstream"])
    together = (losses[0], sum(for_hidden), torch.cat(for_weight)[:vocabulary])
    for found, exact in zip(together, wanted, strict=True):
        assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12 * (1 + exact.abs().max().item()))
    assert not torch.cat(for_weight)[vocabulary:].any()


def test_a_compiler_leaves_it_alone():
    hidden, weight, labels = inputs()
    wanted = with_gradients(linear_cross_entropy, hidden, weight, labels, chunk=10)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager")
    found = with_gradients(compiled, hidden, weight, labels, chunk=10)
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_labels_of_another_shape_and_dtype(backend):
    hidden, weight, labels = inputs(tokens=12)
    wanted = linear_cross_entropy(hidden, weight, labels, backend=backend)
    for same in (labels.view(3, 4), labels[:, None], labels.int()):
        assert torch.equal(linear_cross_entropy(hidden, weight, same, backend=backend), wanted)


def test_extreme_logits_stay_finite():
    hidden, weight, labels = inputs()
    found = with_gradients(linear_cross_entropy, hidden * 100, weight * 100, labels)
    assert_all_close(
        found, with_gradients(on_whole_logits, (hidden * 100).double(), (weight * 100).double(), labels), 1e-5
    )
    split = over_ranks(SimulatedRanks(2), hidden * 100, weight * 100, labels, 15)
    assert_all_close(
        (split[0][0], split[0][1] + split[1][1], torch.cat([s[2] for s in split])[:VOCABULARY]), found, 1e-5
    )


def test_a_head_without_a_word_is_refused():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"a head of weight \[0, \d+\] has no word"):
        linear_cross_entropy(hidden, weight[:0], labels)


def test_chunk_without_a_token_is_refused():
    with pytest.raises(ValueError, match="chunk=0: a chunk has at least one token"):
        linear_cross_entropy(*inputs(), chunk=0)


@pytest.mark.parametrize(("given", "missing"), [("all_max", "all_sum"), ("all_sum", "all_max")])
def test_one_reduction_alone_is_refused(given, missing):
    with pytest.raises(ValueError, match=f"was given {given} without {missing}; a split vocabulary needs both"):
        linear_cross_entropy(*inputs(), **{given: lambda tensor: tensor})
