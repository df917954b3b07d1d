"""The backward pass starts a message, computes weight gradients while it travels, and only then waits for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox_hf import GPTNeoXConfig, GPTNeoXLayer
from neox_hf.parallel import ColumnParallelLinear, TensorRegion, messages

HIDDEN, INNER, LENGTH = 32, 48, 8
FIELDS = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 1}


class Wire:
    """Takes messages for two ranks that send the same, and writes down when each starts and is waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def send(self, name: str, tensor: torch.Tensor) -> "Travelling":
        name += "" if tensor.ndim > 1 else " of the norms"
        self.log.append(f"start {name}")
        return Travelling(self.log, name)

    def all_reduce(self, tensor, group, async_op):
        assert async_op
        tensor.mul_(2)
        return self.send("all-reduce", tensor)

    def all_gather(self, joined, share, group, async_op):
        assert async_op
        joined.view(2, *share.shape).copy_(share)
        return self.send("all-gather", share)

    def reduce_scatter(self, mine, shares, group, async_op):
        assert async_op
        mine.copy_(shares.view(2, *mine.shape)[0] * 2)
        return self.send("reduce-scatter", mine)


class Travelling:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait(self) -> None:
        self.log.append(f"wait {self.name}")


class Products(TorchDispatchMode):
    """Writes down the matrix products that make a tensor of one of the shapes it was given."""

    def __init__(self, log: list[str], names: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self.log, self.names = log, names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and tuple(made.shape) in self.names:
            self.log.append(self.names[tuple(made.shape)])
        return made


@pytest.fixture
def log(monkeypatch) -> list[str]:
    written: list[str] = []
    wire = Wire(written)
    monkeypatch.setattr(messages.dist, "all_reduce", wire.all_reduce)
    monkeypatch.setattr(messages, "all_gather", wire.all_gather)
    monkeypatch.setattr(messages, "reduce_scatter", wire.reduce_scatter)
    return written


def region(sequence: bool) -> TensorRegion:
    return TensorRegion(size=2, rank=0, sequence=sequence, group=object())


@pytest.mark.parametrize("parallel", [True, False])
def test_all_reduce_travels_while_column_linears_get_their_gradients(parallel, log):
    layer = GPTNeoXLayer(GPTNeoXConfig(**FIELDS, use_parallel_residual=parallel), 0, region(sequence=False))
    hidden = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    output = layer(hidden, position_embeddings=(torch.zeros(1, LENGTH, 1), torch.zeros(1, LENGTH, 1)))
    log.clear()
    with Products(log, {(3 * HIDDEN // 2, HIDDEN): "gradient of qkv", (INNER // 2, HIDDEN): "gradient of h_to_4h"}):
        output.sum().backward()
    start, wait = (
        [f"{what} all-reduce{of}" for of in order]
        for what, order in (("start", ("", " of the norms")), ("wait", (" of the norms", "")))
    )
    qkv, h_to_4h = "gradient of qkv", "gradient of h_to_4h"
    if parallel:
        assert log == [*start, qkv, h_to_4h, *wait]
    else:
        assert log == [*start, h_to_4h, *wait, *start, qkv, *wait]


@pytest.mark.parametrize("parallel", [True, False])
def test_norms_that_are_not_trained_send_nothing(parallel, log):
    layer = GPTNeoXLayer(GPTNeoXConfig(**FIELDS, use_parallel_residual=parallel), 0, region(sequence=False))
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.requires_grad_(False)
    hidden = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    layer(hidden, position_embeddings=(torch.zeros(1, LENGTH, 1), torch.zeros(1, LENGTH, 1))).sum().backward()
    assert not any("norms" in line for line in log)
    assert hidden.grad is not None


def test_norms_of_a_stream_that_is_not_trained_have_their_sums(log):
    """Nothing before them is: theirs is the only message."""
    layer = GPTNeoXLayer(GPTNeoXConfig(**FIELDS), 0, region(sequence=False))
    sums = []
    for gives in (True, False):
        hidden = torch.ones(2, LENGTH, HIDDEN, requires_grad=gives)
        layer(hidden, position_embeddings=(torch.zeros(1, LENGTH, 1), torch.zeros(1, LENGTH, 1))).sum().backward()
        sums.append(layer.input_layernorm.bias.grad.clone())
        if gives:
            log.clear()
    assert [line for line in log if "start" in line] == ["start all-reduce", "start all-reduce of the norms"]
    torch.testing.assert_close(sums[1], 2 * sums[0])  # the second was added to the first


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
def test_the_rotation_sums_the_bias_of_query_key_and_value(sequence, trained, log):
    """Once: the gradients are those of the references, where the linear itself does."""
    gradients = {}
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        layer = GPTNeoXLayer(GPTNeoXConfig(**FIELDS, kernels=kernels), 0, region(sequence)).train()
        layer.attention.query_key_value.bias.requires_grad_(trained)
        hidden = torch.randn(2, LENGTH // (1 + sequence), HIDDEN, requires_grad=True)
        angles = torch.randn(2, 1, LENGTH, 1).unbind()
        layer(hidden, position_embeddings=angles).square().sum().backward()
        gradients[kernels] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert (gradients["triton"]["attention.query_key_value.bias"] is not None) == trained
    for name, gradient in gradients["torch"].items():
        torch.testing.assert_close(gradients["triton"][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("parallel", [True, False])
def test_the_gradient_of_the_stream_is_one_ranks(parallel, log):
    """It joins the norms' gradient in their kernel, and the sum over ranks counts it once."""
    gradients = {}
    for rank in range(2):
        torch.manual_seed(0)
        config = GPTNeoXConfig(**FIELDS, use_parallel_residual=parallel)
        layer = GPTNeoXLayer(config, 0, TensorRegion(size=2, rank=rank, group=object()))
        for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            torch.nn.init.zeros_(linear.weight)  # so that the branches have no part in it
        hidden = torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
        output = layer(hidden, position_embeddings=(torch.zeros(1, LENGTH, 1), torch.zeros(1, LENGTH, 1)))
        output.backward(torch.ones_like(output))
        gradients[rank] = hidden.grad
    passes = 2 if parallel else 4  # `Wire` doubles in each sum what the first rank has
    assert torch.equal(gradients[0], torch.full_like(gradients[0], passes))
    assert not gradients[1].any()


def test_under_sequence_parallelism_both_messages_travel_meanwhile(log):
    linear = ColumnParallelLinear(HIDDEN, INNER, region(sequence=True)).train()
    output = linear(torch.randn(2, LENGTH // 2, HIDDEN, requires_grad=True))
    log.clear()
    names = {(2 * LENGTH, HIDDEN): "gradient of x", (INNER // 2, HIDDEN): "gradient of the weight"}
    with Products(log, names):
        output.sum().backward()
    assert log == [
        "start all-gather",
        "gradient of x",
        "start reduce-scatter",
        "wait all-gather",
        "gradient of the weight",
        "wait reduce-scatter",
    ]
