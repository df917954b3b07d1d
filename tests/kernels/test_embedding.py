"""The embedding's gradient: torch's, in one pass, where it is to be summed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neox_hf.kernels import embedding
from neox_hf.kernels.embedding import embedding_gradient_, embedding_of_share
from neox_hf.kernels.weight_gradient import SumInGrad, sum_in
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from tests.kernels.embedding_cases import CASES, check, check_share, in_blocks, words_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", [8, 300, 1030])
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_the_truth_than_torch(case, columns):
    tokens, words = CASES[case]
    check(words_of(tokens, words, CPU), words, columns, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_that_end_with_blocks(dtype):
    check(in_blocks(CPU), 9, 40, dtype)


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_there_is_added_to_or_overwritten(keep):
    ids, dy, total = in_blocks(CPU), torch.randn(241, 24), torch.randn(9, 24)
    wanted = (total if keep else torch.zeros_like(total)).double().index_add(0, ids, dy.double())
    embedding_gradient_(total, ids, dy, keep)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summed", [False, True])
def test_a_transposed_weight(summed):
    ids, dy = in_blocks(CPU), torch.randn(241, 24)
    weight = nn.Parameter(torch.randn(24, 9).t())
    if summed:
        sum_in(weight, SumInGrad())
    for _ in range(2):
        embedding(ids, weight, backend="triton").backward(dy)
    wanted = torch.zeros(9, 24).double().index_add(0, ids, 2 * dy.double())
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_are_weighed():
    ids, dy, factors, total = in_blocks(CPU), torch.randn(241, 24).bfloat16(), torch.randn(241), torch.randn(9, 24)
    wanted = total.double().index_add(0, ids, dy.double() * factors[:, None])
    embedding_gradient_(total, ids, dy, True, factors)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_same_bits_again():
    ids, dy = in_blocks(CPU), torch.randn(241, 24)
    first, second = torch.empty(9, 24), torch.empty(9, 24)
    embedding_gradient_(first, ids, dy, False)
    embedding_gradient_(second, ids.view(1, -1), dy.view(1, 241, 24), False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(shape):
    weight = torch.randn(3, 8, requires_grad=True)
    embedding(torch.empty(shape, dtype=torch.int64), weight, backend="triton").sum().backward()
    assert not weight.grad.any()


def summed_weight(dtype=torch.bfloat16):
    weight = nn.Parameter(torch.randn(9, 24).to(dtype))
    weight.grad_dtype = torch.float32
    sum_in(weight, SumInGrad())
    return weight


def test_it_is_summed_in_fp32_where_the_weight_says():
    weight, ids, heard = summed_weight(), in_blocks(CPU), []
    weight.register_post_accumulate_grad_hook(lambda weight: heard.append(weight.grad))
    total = torch.zeros(9, 24, dtype=torch.float64)
    for _ in range(2):
        dy = torch.randn(241, 24).bfloat16()
        embedding(ids, weight, backend="triton").backward(dy)
        total.index_add_(0, ids, dy.double())
    assert weight.grad.dtype == torch.float32
    assert [grad is weight.grad for grad in heard] == [True, True]
    torch.testing.assert_close(weight.grad.double(), total, rtol=1e-5, atol=1e-4)


def test_a_shared_weight_leaves_it_to_autograd():
    """Which calls hooks when both gradients are there."""
    weight, heard = summed_weight(), []
    weight.register_post_accumulate_grad_hook(lambda weight: heard.append(1))
    y = embedding(torch.tensor([1, 2]), weight, shared=True, backend="triton")
    F.linear(y, weight).sum().backward()
    assert heard == [1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("why", ["no grad", "frozen", "trained"])
def test_values(backend, why):
    weight, ids = torch.randn(5, 8, requires_grad=why != "frozen"), torch.tensor([[1, 4, 1]])
    with torch.set_grad_enabled(why != "no grad"):
        y = embedding(ids, weight, backend=backend)
    assert torch.equal(y, F.embedding(ids, weight))
    assert y.requires_grad is (why == "trained")


def test_compiles_into_one_graph():
    weight = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(lambda ids: embedding(ids, weight, backend="triton"), backend="aot_eager", fullgraph=True)
    compiled(torch.tensor([1, 4, 1])).sum().backward()
    assert weight.grad.sum(1).tolist() == [0, 16, 0, 0, 8]


def test_a_fake_tensor_knows_the_ops():
    what = {"test_utils": ("test_schema", "test_faketensor")}
    gradient = (torch.empty(9, 24), in_blocks(CPU), torch.randn(241, 24), False)
    for factors in ((), (torch.randn(241),)):
        torch.library.opcheck(embedding_gradient_, (*gradient, *factors), **what)
    torch.library.opcheck(embedding_of_share, (in_blocks(CPU), torch.randn(4, 24)), **what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("why", ["frozen", "trained", "summed", "shared"])
@pytest.mark.parametrize("columns", [24, 300])
def test_a_share_of_the_vocabulary(columns, why, dtype):
    """Ids below and beyond, among them whole blocks of 32 tokens, and one that is the last in the order."""
    check_share(torch.device("cpu"), columns, why, dtype)


def test_a_share_that_holds_none_of_the_words():
    for backend in ("torch", "triton"):
        weight = torch.randn(5, 8, requires_grad=True)
        y = embedding(torch.tensor([[-1, 5], [-70, 90]]), weight, of_share=True, backend=backend)
        y.sum().backward()
        assert not y.any()
        assert not weight.grad.any()
    assert embedding(torch.empty(0, dtype=torch.int64), weight, of_share=True, backend="triton").shape == (0, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_s_embedding(tied):
    """Its gradient is that of the references, tied to the head or not."""
    grads = []
    for kernels in ("torch", "triton"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        config = GPTNeoXConfig(**sizes, vocab_size=40, tie_word_embeddings=tied, kernels=kernels, use_cache=False)
        model = GPTNeoXForCausalLM(config)
        for parameter in model.parameters():
            sum_in(parameter, SumInGrad())
        for _ in range(2):
            ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
            model(input_ids=ids, labels=ids).loss.backward()
        grads.append(model.gpt_neox.embed_in.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", ["hook", "padding"])
def test_a_module_that_is_more_than_its_weight_is_called(change, monkeypatch):
    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=40, use_cache=False
    )
    model, called = GPTNeoXForCausalLM(config), []
    if change == "hook":
        model.gpt_neox.embed_in.register_forward_hook(lambda *_: called.append(1))
    else:
        model.gpt_neox.embed_in = nn.Embedding(40, 16, padding_idx=3)
        monkeypatch.setattr(
            nn.Embedding, "forward", lambda self, ids: called.append(1) or F.embedding(ids, self.weight)
        )
    model(input_ids=torch.tensor([[1, 2]]))
    assert called == [1]
