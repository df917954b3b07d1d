"""The file of a library's algorithms that were quickest on one device: what is in it, and when it counts.

    {"format": 2, "device": "NVIDIA H200", "cublaslt": "130100",
     "products": {"bfloat16 65536x768x3072 row column -> bfloat16":
                  {"algorithm": "4200...", "plain_ms": 0.490, "ms": 0.406}, ...}}

`algorithm` is null where none was quicker than what computes such a product otherwise, in `plain_ms`. It lies in a
folder of its library's (`cache_file.py`). Whatever is wrong with it, a run goes on and measures again.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neox_hf.kernels.cache_file import cache_path, replace_whole

logger = logging.getLogger(__name__)

FORMAT = 2


@dataclass(frozen=True)
class Measured:
    """What was found for a kind of product: how the library is to compute it, or None for not at all, and ms."""

    algorithm: str | None
    plain_ms: float
    ms: float


@dataclass(frozen=True)
class ChoiceFile:
    """The file of one device and one version of a library.

    is_algorithm: whether a text may be one, so that a broken file is found out before it is used.
    """

    path: Path
    device_name: str
    library: str
    version: str
    is_algorithm: Callable[[str], bool]

    @classmethod
    def of(
        cls, folder: str, device_name: str, library: str, version: str, is_algorithm: Callable[[str], bool]
    ) -> "ChoiceFile":
        return cls(cache_path(folder, device_name), device_name, library, version, is_algorithm)

    def read(self) -> dict[str, Measured]:
        """By kind of product; nothing, with a warning, where the file does not count here or is broken."""
        try:
            document = json.loads(self.path.read_bytes())
            if (document["format"], document[self.library]) != (FORMAT, self.version):
                logger.info("%s was measured with another %s; products are measured again", self.path, self.library)
                return {}
            return {str(kind): self._entry(item) for kind, item in document["products"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%r); products are measured again, and it is replaced", self.path, error)
            return {}

    def agree(self, kind: str, found: Measured) -> Measured:
        """Write what was found, unless another process has been first: then its choice holds here too, so that all
        ranks of a host, and those of a run that goes on later, choose alike. Where nothing can be written, it says so.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # closing it, or a crash, releases it
                products = self.read()
                if kind not in products:
                    products[kind] = found
                    self._write(products)
                return products[kind]
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s), so the next run measures products again, and may choose others; set "
                "NEOX_HF_CACHE to a folder that can",
                self.path,
                error.strerror,
            )
            return found

    def _write(self, products: Mapping[str, Measured]) -> None:
        document = {
            "format": FORMAT,
            "device": self.device_name,
            self.library: self.version,
            "products": {kind: asdict(products[kind]) for kind in sorted(products)},
        }
        replace_whole(self.path, document)

    def _entry(self, item: Mapping[str, Any]) -> Measured:
        algorithm = item["algorithm"]
        if algorithm is not None and not self.is_algorithm(algorithm):
            raise ValueError(f"{algorithm!r} is no algorithm of {self.library}")
        return Measured(algorithm, float(item["plain_ms"]), float(item["ms"]))
