"""The version of this package, and those of the libraries that decide what a run computes."""

import importlib.metadata
import platform

VERSION = "0.1.0"

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, str]:
    """Package -> version, ours and Python's first; libraries that are not installed are left out."""
    found = {"neox_hf": VERSION, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
