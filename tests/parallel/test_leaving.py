"""Row linears that leave together: the sum, its gradients, and messages that travel while products are computed."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox_hf import GPTNeoXConfig, GPTNeoXLayer
from neox_hf.kernels import product as product_module
from neox_hf.kernels.late_tensor import LateTensor, mark
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling import layer as layer_module
from neox_hf.modeling.recompute import selective_contexts
from neox_hf.parallel import RowParallelLinear, TensorRegion, leave_by_parts, leaving, messages
from tests.gloo import run_ranks
from tests.parallel.regions import region_of

TOKENS, WIDTHS, OUT = 12, (8, 20), 6


def branches(rank, dtype=torch.float64, trained=(True, True)):
    """Inputs [2, 6, in / 2] of two row linears, and the linears."""
    region, random = region_of(rank), torch.Generator().manual_seed(rank)
    made = []
    for width, trains in zip(WIDTHS, trained, strict=True):
        linear = RowParallelLinear(width, OUT, region).to(dtype)
        with torch.no_grad():
            linear.weight.normal_(generator=random)
            linear.bias.normal_(generator=torch.Generator().manual_seed(width))
        linear.weight.requires_grad_(trains)
        x = torch.randn(2, TOKENS // 2, width // 2, generator=random, dtype=dtype).requires_grad_()
        made.append((x, linear))
    return made


def by_hand(stream, pairs, upstream):
    """The stream as it leaves, and the gradients of the inputs and weights."""
    total = sum((x.detach() @ linear.weight.detach().t()) for x, linear in pairs)
    dist.all_reduce(total)
    total += stream.detach() + sum(linear.bias.detach() for _, linear in pairs)
    flat = upstream.flatten(0, 1)
    found = [(upstream @ linear.weight.detach(), flat.t() @ x.detach().flatten(0, 1)) for x, linear in pairs]
    return total, [gradient for pair in found for gradient in pair]


class ThroughBackend:
    """An exchange that leaves every message to the backend."""

    copies = True

    def start(self, tensor, out=None, beside=None):
        return None


def differences(rank, by_parts, summed, late, trained):
    """What is not as by hand."""
    leaving.LEAST_TOKENS = 1
    pairs = branches(rank, trained=trained)
    upstream = torch.randn(2, TOKENS // 2, OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    if summed:
        for _, linear in pairs:
            sum_in(linear.weight, SumInGrad())
    inputs, again = [x for x, _ in pairs], LateTensor()
    if late:
        inputs[1] = mark(inputs[1] * 1, again)
    linears = [linear for _, linear in pairs]
    stream = torch.randn(upstream.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    stream.requires_grad_()
    region = replace(linears[0].region, exchange=ThroughBackend() if by_parts else None)
    total = leave_by_parts(region, stream, *zip(inputs, linears, strict=True))
    wanted, gradients = by_hand(stream, pairs, upstream)
    total.backward(upstream)
    if late:
        assert again.is_awaited
        again.arrive(inputs[1].detach())
    found = [t.grad for x, linear in pairs for t in (x, linear.weight)]
    off = [] if torch.allclose(total, wanted) else ["total"]
    off += [] if torch.equal(stream.grad, upstream) else ["stream"]
    off += [str(n) for n, linear in enumerate(linears) if not torch.allclose(linear.bias.grad, upstream.sum((0, 1)))]
    frozen = [False, not trained[0], False, not trained[1]]
    for name, one, other, none in zip(("x1", "w1", "x2", "w2"), found, gradients, frozen, strict=True):
        if (one is None) is not none or (one is not None and not torch.allclose(one, other)):
            off.append(name)
    return off


CASES = [
    (False, False, False, (True, True)),
    (True, False, False, (True, True)),
    (True, True, False, (True, True)),
    (True, True, True, (True, True)),
    (True, True, False, (False, True)),
    (False, False, False, (True, False)),
]


def all_differences(rank):
    return [differences(rank, *case) for case in CASES]


def test_the_sum_and_its_gradients():
    assert run_ranks(all_differences, 2) == [[[]] * len(CASES)] * 2


@pytest.mark.parametrize(("tokens", "wanted"), [(1, [1]), (4095, [4095]), (4096, [3072, 1024]), (8193, [6145, 2048])])
def test_parts(tokens, wanted):
    parts = leaving._parts(tokens, travels_beside=True)
    assert [part.stop - part.start for part in parts] == wanted
    assert (parts[0].start, parts[-1].stop) == (0, tokens)
    assert leaving._parts(tokens, travels_beside=False) == [slice(0, tokens)]


HIDDEN, INNER = 32, 48
FIELDS = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.fixture
def log(monkeypatch):
    """Messages of a group of two that sends the same, as they start and are waited for, and the products between."""
    written = []

    def all_reduce(tensor, group, async_op):
        tensor.mul_(2)
        large = tensor.ndim > 1
        written.extend(["start"] * large)
        return Awaited(written if large else [])

    def add(out, *given, **how):
        written.append("product")
        return product_module.product_(out, *given, **how)

    monkeypatch.setattr(messages.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(leaving, "product_", add)
    monkeypatch.setattr(leaving, "LEAST_TOKENS", 2)
    return written


class Awaited:
    def __init__(self, log):
        self.log = log

    def wait(self):
        self.log.append("wait")


def layer_of_two(exchange=None, **fields):
    region = TensorRegion(size=2, rank=0, group=object(), exchange=exchange)
    return GPTNeoXLayer(GPTNeoXConfig(**FIELDS, **fields), 0, region)


def run(layer, length=8):
    x = torch.randn(1, length, HIDDEN, requires_grad=True)
    cos_sin = torch.randn(2, 1, length, 2).unbind()
    return layer(x, position_embeddings=cos_sin), x


def test_messages_that_take_multiprocessors_wait_for_all_products(log):
    run(layer_of_two())
    assert log == ["product", "product", "start", "wait"]


def test_messages_by_copies_travel_behind_products(log):
    run(layer_of_two(ThroughBackend()))
    assert log == ["product", "product", "start", "product", "product", "start", "wait", "wait"]


@pytest.mark.parametrize("how", [{}, {"context_fn": selective_contexts}], ids=["full", "selective"])
def test_recomputation_sends_nothing_again(how, log):
    layer, x = layer_of_two(ThroughBackend()), torch.randn(1, 8, HIDDEN, requires_grad=True)
    cos_sin = torch.randn(2, 1, 8, 2).unbind()
    y = checkpoint(lambda x: layer(x, position_embeddings=cos_sin), x, use_reentrant=False, **how)
    before = list(log)
    y.sum().backward()
    assert log[: len(before)] == before
    assert log[len(before) :] == ["start", "wait"]  # the gradient that leaves by `enter`


@pytest.mark.parametrize("change", ["dropout", "hook", "adapter", "sequential"])
def test_what_keeps_the_branches_apart(change, log, monkeypatch):
    fields = {"dropout": {"hidden_dropout": 0.1}, "sequential": {"use_parallel_residual": False}}.get(change, {})
    layer, seen = layer_of_two(**fields), []
    if change == "hook":
        layer.mlp.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    elif change == "adapter":
        layer.attention.dense = nn.Sequential(layer.attention.dense)
    monkeypatch.setattr(layer_module, "leave_by_parts", None)
    run(layer)
    assert log
    assert "product" not in log
    assert seen == ([(1, 8, HIDDEN)] if change == "hook" else [])


def test_in_evaluation_dropout_is_no_reason(log):
    run(layer_of_two(hidden_dropout=0.1).eval())
    assert log.count("start") == 1
    assert log.count("product") == 2


@pytest.mark.parametrize("frozen", ["mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"])
@pytest.mark.parametrize("summed", [False, True])
def test_behind_gelu_only_what_trains_has_a_gradient(frozen, summed, log):
    layer = layer_of_two(kernels="triton")
    for parameter in layer.parameters() if summed else ():
        sum_in(parameter, SumInGrad())
    layer.get_parameter(frozen).requires_grad_(False)
    y, _ = run(layer)
    y.sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == [frozen]


def test_a_column_linear_that_does_not_train_is_read_as_it_is(log):
    layer = layer_of_two(kernels="triton")
    layer.mlp.dense_h_to_4h.weight.requires_grad_(False)
    y, x = run(layer)
    y.sum().backward()
    assert x.grad is not None
    assert layer.mlp.dense_h_to_4h.bias.grad is not None
