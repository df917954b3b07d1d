"""The file of launches that were tuned for one device: where it is, what is in it, and when it counts.

    {"format": 1, "device": "NVIDIA H200", "triton": "3.6.0",
     "launches": [{"op": "column_sums", "dtype": "bfloat16", "shape": [2048], "launch": {"rows": 4, ...},
                   "default_ms": 0.031, "ms": 0.028}, ...]}

It lies under `launches/` (`cache_file.py`). Whatever is wrong with it, a run goes on by the defaults, after one
warning: kernels compute the same with any launch, up to the order of sums.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from neox_hf.kernels.cache_file import cache_path, replace_whole
from neox_hf.kernels.language import triton

logger = logging.getLogger(__name__)

FORMAT = 1


class LaunchKey(NamedTuple):
    """What a launch is tuned for: an op, the dtype that it reads, and the shape that it says matters."""

    op: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op}, {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class TunedLaunch:
    """An entry: the fields of a launch that was quicker than the default, and the milliseconds of both."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    launch: dict[str, int]
    default_ms: float
    ms: float

    @property
    def key(self) -> LaunchKey:
        return LaunchKey(self.op, self.dtype, self.shape)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def launch_path(device_name: str) -> Path:
    """The file of the device of that name, which may not exist."""
    return cache_path("launches", device_name)


@functools.cache
def read_launches(path: Path) -> dict[LaunchKey, dict[str, int]]:
    """The tuned launches in a file, by key; none where there is no file, or it does not count here.

    Read once, so that it warns once: `cache_clear()` forgets it.
    """
    entries = read_entries(path)
    if entries:
        logger.info("launches of kernels: %d tuned ones of %s, else the defaults", len(entries), path)
    return {entry.key: entry.launch for entry in entries}


def read_entries(path: Path) -> list[TunedLaunch]:
    """The entries of a file that counts here; for any other one, but one that is missing, a warning and none."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        logger.warning(
            "%s %s; kernels are launched by their defaults. Tune again by `python -m neox_hf.tune --config ...`, "
            "or delete the file",
            path,
            reason,
        )
        return []


def _parsed(text: bytes) -> list[TunedLaunch]:
    """The entries in a file of this content.

    Raises:
        ValueError: it is no such file, or one of another format or another Triton; the message goes on from its name.
    """
    try:
        document = json.loads(text)
        made_by = document["format"], document["triton"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"is no file of tuned launches ({error!r})") from error
    if made_by[0] != FORMAT:
        raise ValueError(f"is of format {made_by[0]}, and format {FORMAT} is read here")
    if made_by[1] != triton.__version__:
        raise ValueError(f"was tuned with Triton {made_by[1]}, and here is {triton.__version__}")
    try:
        return [_entry(item) for item in document["launches"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has an entry that is not as it should be ({error!r})") from error


def _entry(item: Mapping[str, Any]) -> TunedLaunch:
    launch = {str(name): int(value) for name, value in item["launch"].items()}
    shape = tuple(int(size) for size in item["shape"])
    return TunedLaunch(str(item["op"]), str(item["dtype"]), shape, launch, float(item["default_ms"]), float(item["ms"]))


def write_entries(path: Path, device_name: str, entries: Sequence[TunedLaunch]) -> None:
    """Replace the file as a whole: who reads it meanwhile sees the one before.

    Raises:
        OSError: it cannot be written; the one before is untouched.
    """
    document = {
        "format": FORMAT,
        "device": device_name,
        "triton": triton.__version__,
        "launches": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.key)],
    }
    replace_whole(path, document)
