"""Tokens per second of one core: the tokenizer alone, and the whole stream (read, tokenize, pack, batch).

    python scripts/bench_tokenization.py [--path SOURCE] [--vocab-size N] [--seconds S]

Trains a byte-level BPE on the source (default: the interpreter's standard library), then times both on the same
documents in turns, as other load on the machine comes and goes, and prints the medians. The start is timed apart: a
stream that has remembered no word yet, from its construction on, over its first batches.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch

from neox_hf.data import DataSettings, SourceSettings, StreamLoader, TokenizerSettings, TokenStream, build_tokenizer
from neox_hf.data.encoding import plain_copy
from neox_hf.data.tokenizer_corpus import TokenizerCorpus

BATCH_DOCUMENTS = 16
FIRST_BATCHES = 64


def bare_batches(tokenizer, texts: list[str]) -> Iterator[int]:
    """Tokens of each call of encode_batch_fast, endlessly."""
    encoder = plain_copy(tokenizer)
    groups = cycle(range(0, len(texts), BATCH_DOCUMENTS))
    for begin in groups:
        encodings = encoder.encode_batch_fast(texts[begin : begin + BATCH_DOCUMENTS], add_special_tokens=False)
        yield sum(len(encoding) for encoding in encodings)


def stream_batches(loader: StreamLoader) -> Iterator[int]:
    """Tokens of each batch, endlessly."""
    return (batch["input_ids"].numel() for batch in loader)


def rate(batches: Iterator[int], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Tokens per second over about `seconds`."""
    begin, tokens = clock(), 0
    while (elapsed := clock() - begin) < seconds:
        tokens += next(batches)
    return tokens / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default="stdlib", help="a source, as data.sources names it")
    parser.add_argument("--vocab-size", type=int, default=50_254)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of the rounds")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    source = SourceSettings(path=options.path)
    data = DataSettings(sources=[source], seq_length=options.seq_length, streams=options.streams)
    with tempfile.TemporaryDirectory() as folder:
        wanted = TokenizerSettings(kind="trained", vocab_size=options.vocab_size)
        tokenizer = build_tokenizer(wanted, data, Path(folder))
    texts = list(TokenizerCorpus(data).texts())
    bare = bare_batches(tokenizer, texts)
    begin = time.perf_counter()
    stream = stream_batches(StreamLoader(TokenStream(data, tokenizer, split="train"), batch_size=8))
    first_tokens = sum(islice(stream, FIRST_BATCHES))
    first_rate = first_tokens / (time.perf_counter() - begin)
    rounds = [(rate(bare, options.seconds), rate(stream, options.seconds)) for _ in range(options.rounds)]
    bare_rate, stream_rate = (median(rates) for rates in zip(*rounds, strict=True))
    print(f"{options.path}: {sum(map(len, texts)) / 1e6:.1f} M characters, vocabulary {len(tokenizer)}, one core")
    print(f"encode_batch_fast alone  {bare_rate / 1e6:.3f} M tokens/s")
    print(f"the whole stream         {stream_rate / 1e6:.3f} M tokens/s ({stream_rate / bare_rate:.1f} times)")
    print(f"its first {first_tokens / 1e6:.1f} M tokens   {first_rate / 1e6:.3f} M tokens/s, construction included")


if __name__ == "__main__":
    main()
