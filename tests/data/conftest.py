"""A tokenizer that needs no training, and streams over small settings."""

from collections.abc import Callable

import pytest

from neox_hf.data import DataSettings, TokenStream
from neox_hf.data.tokenization import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def stream_over(tokenizer) -> Callable[..., TokenStream]:
    """Opens the training stream of `settings_for(...)`, for one data rank."""

    def open_stream(settings: DataSettings, rank: int = 0, size: int = 1, **options) -> TokenStream:
        return TokenStream(settings, tokenizer, split="train", data_rank=rank, data_size=size, **options)

    return open_stream
