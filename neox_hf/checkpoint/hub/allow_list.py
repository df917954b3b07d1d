"""What may leave this machine: a short list of file names, and a look inside each file."""

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

from neox_hf.checkpoint.hub.faults import Rejected

WEIGHTS = ("*.safetensors", "model.safetensors.index.json", "adapter_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DESCRIPTION = ("config.json", "generation_config.json", "README.md", "LICENSE", "recipe.yaml", "loss_curve.png")
ALLOWED = WEIGHTS + TOKENIZER + DESCRIPTION

HUB_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
SECRET_VARIABLES = ("TOKEN", "API_KEY", "SECRET", "SECRET_ACCESS_KEY", "PASSWORD")
SHORTEST_SECRET = 16  # characters; a shorter value would match ordinary text


def is_allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def is_weights(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in WEIGHTS)


def allowed_files(folder: Path) -> list[Path]:
    """The files of `folder` that may be pushed, by name. Subfolders and links are never among them."""
    return sorted(
        path for path in folder.iterdir() if is_allowed(path.name) and path.is_file() and not path.is_symlink()
    )


def secrets_of_environment(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of variables such as HF_TOKEN or WANDB_API_KEY."""
    return [
        value
        for name, value in environment.items()
        if name.upper().endswith(SECRET_VARIABLES) and len(value) >= SHORTEST_SECRET
    ]


def check_contents(files: Iterable[Path], secrets: Iterable[str]) -> None:
    """Raise `Rejected` for a file that holds a secret, or weights that are not safetensors (a renamed pickle)."""
    known = [re.escape(secret.encode()) for secret in secrets]
    secret = re.compile(b"|".join([HUB_TOKEN.pattern, *known]))
    for path in files:
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif found := secret.search(content := path.read_bytes()):
            line = content.count(b"\n", 0, found.start()) + 1
            raise Rejected(f"{path.name}:{line} holds an access token or another secret; remove it and publish again")


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening reads the header and compares it with the size of the file
    except SafetensorError as error:
        raise Rejected(f"{path.name} is not a whole safetensors file: {error}") from error
