"""A small corpus, and the sample sequence as a naive program would write it: whole lists, no cursors, no resuming."""

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from neox_hf.data import DataSettings, SourceSettings, TokenStream
from neox_hf.data.hashing import permuted

END = 256


def make_texts(count: int, seed: int = 0, longest: int = 90) -> list[str]:
    """Texts of 1 to `longest` words; each is told from the others by its number."""
    rng = random.Random(seed)
    return [f"{seed}.{n} " + "ab cd ё "[: rng.randint(1, 8)] * rng.randint(0, longest // 4) for n in range(count)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def settings_for(*paths: Path | str, **changes) -> DataSettings:
    sources = [SourceSettings(path=str(path)) for path in paths]
    plain = DataSettings(sources=sources, seq_length=32, streams=4, shuffle=False, eval_fraction=0.0, eval_samples=4)
    return replace(plain, **changes)


def first_samples(stream: TokenStream, count: int) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in islice(stream, count)]


def naive_samples(
    owner_and_texts: Callable[[int], list[tuple[int, str]]], streams: int, seq_length: int, count: int
) -> list[list[int]]:
    """The first `count` samples of the run, from all documents of every epoch as (stream, text)."""
    tokens: list[list[int]] = [[] for _ in range(streams)]
    needed = -(-count // streams) * seq_length + 1
    epoch = 0
    while min(map(len, tokens)) < needed:
        for owner, text in owner_and_texts(epoch):
            tokens[owner] += [*text.encode(), END]
        epoch += 1
    cuts = [(number % streams, number // streams * seq_length) for number in range(count)]
    return [tokens[stream][begin : begin + seq_length + 1] for stream, begin in cuts]


def owned_epochs(texts: Sequence[str], streams: int, seed: int | None) -> Callable[[int], list[tuple[int, str]]]:
    """Documents that are parts of their own: place p of epoch e goes to stream (p - e) mod L."""

    def documents(epoch: int) -> list[tuple[int, str]]:
        size = len(texts)
        places = range(size) if seed is None else [permuted(place, size, seed, 0, epoch) for place in range(size)]
        return [((place - epoch) % streams, texts[part]) for place, part in enumerate(places)]

    return documents


def dealt_epochs(files: Sequence[Sequence[str]], streams: int) -> Callable[[int], list[tuple[int, str]]]:
    """Rows of few sequential files: row r of the t-th file of epoch e goes to stream (r - e - t) mod L."""

    def documents(epoch: int) -> list[tuple[int, str]]:
        return [
            ((row - epoch - turn) % streams, text) for turn, texts in enumerate(files) for row, text in enumerate(texts)
        ]

    return documents
