"""The `data:` and `tokenizer:` sections of a recipe."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One source of documents.

    path: `stdlib` (the interpreter's standard-library source text), a local file, folder or glob
        (.jsonl, .txt, .parquet, also .gz and .zst), or a Hub dataset as `hub:owner/name`.
    weight: share of the run's samples, relative to the other sources.
    text_key: the column that holds the text (jsonl, parquet, Hub).
    split, name, revision: of a Hub dataset.
    sample_by: what one document of a .txt file is, the whole `document` or each `line`.
    """

    path: str
    weight: float = 1.0
    text_key: str = "text"
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    sample_by: Literal["document", "line"] = "document"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What a run reads, and how documents become samples of `seq_length` tokens.

    sources, eval_sources: where documents come from. With no eval_sources, `eval_fraction` of the documents of
        `sources` (chosen by a hash of their position) is held out for evaluation.
    eval_samples: samples in one evaluation.
    streams: logical streams; the data-parallel size must divide it. Each keeps a document open, so a short run on
        long documents wants few.
    shuffle, seed: a stateless permutation of documents (or of files where a source is sequential).
    document_mask: position ids restart at each document and attention does not cross documents.
    eod_mask_loss: no loss on the first token after an end-of-document token.
    bad_rows: what to do with a row that cannot be used; `quarantine` copies it to `quarantine.jsonl`.
    max_line_bytes: a longer line, or text file, is a bad row.
    workers: loader processes of each rank; 0 reads in the training process.
    """

    sources: list[SourceSettings] = field(default_factory=list)
    eval_sources: list[SourceSettings] = field(default_factory=list)
    eval_fraction: float = 0.01
    eval_samples: int = 64
    seq_length: int = 2048
    streams: int = 960
    shuffle: bool = True
    seed: int = 1234
    document_mask: bool = False
    eod_mask_loss: bool = False
    bad_rows: Literal["error", "skip", "quarantine"] = "error"
    max_line_bytes: int = 64 * 1024 * 1024
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Which tokenizer a run uses.

    kind: `pretrained` (path: a folder, a tokenizer.json or a Hub id), `trained` (byte-level BPE of `vocab_size`,
        trained on the run's training split at start), `byte` (256 bytes and the end-of-document token), or `char`
        (the characters of the training split, others spelt in bytes).
    vocab_size: of `trained` (needed) and `char` (all characters unless given), all tokens counted.
    """

    kind: Literal["pretrained", "trained", "byte", "char"] = "pretrained"
    path: str | None = None
    revision: str | None = None
    vocab_size: int | None = None
