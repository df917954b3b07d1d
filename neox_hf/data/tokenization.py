"""The run's tokenizer: always a fast HF tokenizer, so that it saves beside the weights for stock transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neox_hf.data.settings import DataSettings, TokenizerSettings
from neox_hf.data.tokenizer_corpus import TokenizerCorpus
from neox_hf.data.tokenizer_folder import saved_or_made
from neox_hf.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"


def build_tokenizer(settings: TokenizerSettings, data: DataSettings, save_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `settings` describes, with `eos_token_id` as its end-of-document token.

    `trained` and `char` read the run's training split once and save the result in `save_dir`; a later call with the
    same settings and data finds it there. Call this on rank 0 first: it takes no part in collectives.

    Raises DataError when the tokenizer cannot be found or used, or `save_dir` holds one made with other settings or
    of other documents.
    """
    try:
        build = BUILDERS[settings.kind]
    except KeyError:
        raise DataError(f"tokenizer.kind={settings.kind!r} is unknown; choose one of {sorted(BUILDERS)}") from None
    return build(settings, data, save_dir)


def load_pretrained(settings: TokenizerSettings) -> PreTrainedTokenizerFast:
    """A tokenizer.json, a folder, or a Hub id."""
    if settings.path is None:
        raise DataError("tokenizer.kind=pretrained needs tokenizer.path: a folder, a tokenizer.json or a Hub id")
    try:
        if settings.path.endswith(".json"):
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=_read_json(Path(settings.path)))
        else:
            tokenizer = AutoTokenizer.from_pretrained(settings.path, revision=settings.revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"tokenizer.path={settings.path}: no tokenizer can be loaded from it: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"tokenizer.path={settings.path} is a {type(tokenizer).__name__}, not a fast tokenizer; save it "
            f"with a tokenizer.json first"
        )
    if tokenizer.eos_token_id is None:
        if END_OF_DOCUMENT not in tokenizer.get_vocab():
            raise DataError(
                f"tokenizer.path={settings.path} has no eos_token and no {END_OF_DOCUMENT}; documents need a token "
                f"between them: set eos_token in its tokenizer_config.json"
            )
        tokenizer.eos_token = END_OF_DOCUMENT
    return tokenizer


def _read_json(path: Path) -> Tokenizer:
    text = path.read_text("utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises this class itself, nothing narrower
        raise DataError(f"{path} is not the file of a fast tokenizer: {error}") from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, its id the byte's value, and the end-of-document token 256."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _as_fast(tokenizer)


def byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes.

    A byte whose Latin-1 character is printable stands for itself; the others take the code points from 256 on, in
    order (GPT-2's table).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with up to `vocab_size` tokens, the end-of-document token (id 0) among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_fast(tokenizer)


def char_tokenizer(texts: Iterator[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    """One token for each character of `texts`, the most frequent ones where `vocab_size` is given.

    Ids: 0 the end-of-document token, 1 to 256 the bytes, then characters by code point. A character without a token
    is spelt in bytes, so every text survives encoding and decoding.
    """
    counts: dict[str, int] = {}
    for text in texts:
        for character in set(text):
            counts[character] = counts.get(character, 0) + text.count(character)
    fixed = [END_OF_DOCUMENT, *(f"<0x{byte:02X}>" for byte in range(256))]
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    room = None if vocab_size is None else vocab_size - len(fixed)
    vocabulary = {token: index for index, token in enumerate([*fixed, *sorted(frequent[:room])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _as_fast(tokenizer)


def _as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, clean_up_tokenization_spaces=False
    )


def _check_size(settings: TokenizerSettings, least: int) -> None:
    if settings.vocab_size is not None and settings.vocab_size < least:
        raise DataError(f"tokenizer.vocab_size={settings.vocab_size} must be at least {least} for kind={settings.kind}")


def _pretrained(settings: TokenizerSettings, data: DataSettings, save_dir: Path) -> PreTrainedTokenizerFast:
    return load_pretrained(settings)


def _trained(settings: TokenizerSettings, data: DataSettings, save_dir: Path) -> PreTrainedTokenizerFast:
    if settings.vocab_size is None:
        raise DataError("tokenizer.kind=trained needs tokenizer.vocab_size: the number of tokens to learn")
    _check_size(settings, 257)
    return _of_corpus(settings, data, save_dir, lambda texts: train_bpe(texts, settings.vocab_size))


def _byte(settings: TokenizerSettings, data: DataSettings, save_dir: Path) -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def _char(settings: TokenizerSettings, data: DataSettings, save_dir: Path) -> PreTrainedTokenizerFast:
    _check_size(settings, 258)
    return _of_corpus(settings, data, save_dir, lambda texts: char_tokenizer(texts, settings.vocab_size))


def _of_corpus(
    settings: TokenizerSettings,
    data: DataSettings,
    save_dir: Path,
    make: Callable[[Iterator[str]], PreTrainedTokenizerFast],
) -> PreTrainedTokenizerFast:
    corpus = TokenizerCorpus(data)
    origin = {"kind": settings.kind, "vocab_size": settings.vocab_size, "documents": corpus.fingerprint()}
    return saved_or_made(save_dir, origin, lambda: make(corpus.texts()))


BUILDERS = {"pretrained": _pretrained, "trained": _trained, "byte": _byte, "char": _char}
