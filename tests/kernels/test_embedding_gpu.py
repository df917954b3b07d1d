"""The embedding's gradient on a GPU."""

import pytest
import torch

from neox_hf.kernels.embedding import embedding_gradient_
from tests.kernels.embedding_cases import CASES, check, check_share, in_blocks, words_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 300, 768, 2048, 5120])
@pytest.mark.parametrize("case", [*CASES, "blocks", "text", "one word"])
def test_no_further_from_the_truth_than_torch(case, columns, dtype):
    if case == "blocks":
        ids, words = in_blocks(CUDA), 9
    elif case == "text":  # few words make up most of it
        ids, words = (torch.rand(4, 2048, device=CUDA) ** 6 * 50304).long(), 50304
    elif case == "one word":
        ids, words = torch.ones(3000, dtype=torch.int64, device=CUDA), 3
    else:
        tokens, words = CASES[case]
        ids = words_of(tokens, words, CUDA)
    check(ids, words, columns, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("why", ["frozen", "trained", "summed", "shared"])
@pytest.mark.parametrize("columns", [8, 300, 4096])
def test_a_share_of_the_vocabulary(columns, why, dtype):
    check_share(CUDA, columns, why, dtype)


def test_the_same_bits_again():
    ids = (torch.rand(16384, device=CUDA) ** 6 * 50304).long()
    dy = torch.randn(16384, 768, device=CUDA, dtype=torch.bfloat16)
    first, second = (torch.full((50304, 768), torch.nan, device=CUDA) for _ in range(2))
    for total in (first, second):
        embedding_gradient_(total, ids, dy, False)
    assert torch.equal(first, second)
