"""Small things that the checks of a recipe's values share."""

import dataclasses
from typing import Any

from neox_hf.config import nearest

DDP_KEYS = ("ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph")
"""Knobs of DistributedDataParallel, which much of what runs here does without."""


def changed(settings: Any, key: str) -> bool:
    """Whether a value differs from its default. That it was written says nothing: a resolved recipe writes all."""
    field = next(entry for entry in dataclasses.fields(settings) if entry.name == key)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(settings, key) != default


def did_you_mean(name: str, names: Any) -> str:
    close = nearest(name, names)
    return f"; did you mean {close}?" if close else f"; known are {', '.join(sorted(names))}"
