"""A tokenizer made by the run, in its folder, with a file that says what it was made of."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from neox_hf.data.differences import differences
from neox_hf.errors import DataError

ORIGIN_FILE = "tokenizer_origin.json"


def saved_or_made(
    folder: Path, origin: Mapping[str, object], make: Callable[[], PreTrainedTokenizerFast]
) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, made and saved there first if need be. `origin`, for JSON, decides what it is.

    The origin file is written last: it says that all is there. Raises DataError when `folder` holds a tokenizer of
    another origin: checkpoints may depend on it, so it is not replaced.
    """
    stamp = folder / ORIGIN_FILE
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make().save_pretrained(folder)
        partial = stamp.with_suffix(".partial")
        partial.write_text(json.dumps(origin), "utf-8")
        partial.replace(stamp)
    found = json.loads(stamp.read_text("utf-8"))
    if differing := differences(found, "the folder", origin, "the recipe"):
        raise DataError(
            f"{folder} holds a tokenizer made of something else; restore what it was made of, choose another "
            f"train.output_dir, or remove that folder if no checkpoint depends on it. {differing}"
        )
    return PreTrainedTokenizerFast.from_pretrained(folder)
