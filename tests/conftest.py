"""Every test runs offline, on one thread, and away from the user's caches."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["NEOX_HF_CACHE"] = str(Path(tempfile.gettempdir()) / "neox_hf_tests_use_default_launches")

import pytest
import torch

from tests.gloo import COVERAGE_FILE

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so before any is


def pytest_configure(config: pytest.Config) -> None:
    """The first ranks of a session that measures coverage measure theirs too; see `tests.gloo.measured`."""
    config.addinivalue_line("markers", "no_cover: pytest-cov, where it is installed, measures nothing in this test")
    if getattr(config.option, "cov_source", None):
        os.environ[COVERAGE_FILE] = str(config.rootpath / ".coverage")


LONG_FOLDERS = ["topologies", "recipes", "faults", "training", "checkpoint", "scripts"]
"""Whole runs and benchmarks, in files that take up to a minute."""

UNMEASURED_FOLDERS = {"parity", "scripts"}
"""Compilers and benchmarks, which measuring coverage makes twice as slow; they run what other tests cover."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: workers are dealt files in this order, and end together on short ones."""
    places = {name: place for place, name in enumerate(LONG_FOLDERS)}
    items.sort(key=lambda item: places.get(folder_of(item), len(places)))
    for item in items:
        if folder_of(item) in UNMEASURED_FOLDERS:
            item.add_marker(pytest.mark.no_cover)


def folder_of(item: pytest.Item) -> str:
    """The folder of `tests/` that a test lies in."""
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what was imported and collected: a million objects that stay."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what was never freed would be reported as leaked


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs of a test do not depend on the tests before it."""
    torch.manual_seed(0)
