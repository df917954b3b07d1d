"""docs/architecture.md is true: imports run one way, and heavy libraries are imported where they are used."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "neox_hf"

ALLOWED = {
    "config": set(),
    "kernels": set(),
    "parallel": {"config", "kernels"},
    "modeling": {"parallel", "kernels", "config"},
    "data": {"parallel", "config"},
    "checkpoint": {"data", "modeling", "parallel", "kernels", "config"},
    "training": {"checkpoint", "data", "modeling", "parallel", "kernels", "config"},
    "planning": {"training", "modeling", "parallel", "kernels", "config"},
    "tuning": {"training", "modeling", "kernels"},
}
FILES_THAT_MAY_IMPORT = {
    "deepspeed": {
        "training/deepspeed_gradients.py",
        "training/deepspeed_step.py",
        "training/launch_environment.py",
        "training/pipeline_engine.py",
        "training/pipeline_module.py",
        "training/split_backward.py",
        "training/stage_messages.py",
        "training/zero.py",
    },
    "cutlass": {"kernels/quack_epilogues.py"},
    "datasets": {"data/hub_source.py"},
    "quack": {"kernels/quack_epilogues.py"},
    "huggingface_hub": {"checkpoint/hub/model_card.py", "checkpoint/hub/remote.py", "modeling/configuration.py"},
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of all that a file imports, function-level and type-checking imports included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.append(node.module)
    return names


def package_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else ""


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    package = package_of(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "neox_hf" or len(parts) == 1 or parts[1] in ("errors", "version", package) or not package:
            continue
        assert parts[1] in ALLOWED[package], f"{path}: {package} must not import {name}"


def test_every_package_is_in_the_table():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(ALLOWED)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package in packages:
        assert f"| `{package}/` |" in page, f"docs/architecture.md does not tell what {package}/ is for"


@pytest.mark.parametrize("library", FILES_THAT_MAY_IMPORT)
def test_heavy_libraries_are_imported_in_few_files(library):
    importers = {
        str(path.relative_to(PACKAGE))
        for path in sources()
        if any(name.split(".")[0] == library for name in imported_modules(path))
    }
    assert importers <= FILES_THAT_MAY_IMPORT[library]


def test_kernels_import_torch_and_triton_only():
    """And what an optional package brings, in the one file that is imported where it is installed."""
    for path in (PACKAGE / "kernels").rglob("*.py"):
        may_be_imported = {"torch", "triton"}
        if path.name == "quack_epilogues.py":
            may_be_imported |= {"cutlass", "quack"}
        for name in imported_modules(path):
            if name.split(".")[0] not in sys.stdlib_module_names:
                known = name.split(".")[0] in may_be_imported or name.startswith("neox_hf.kernels")
                assert known, f"{path}: {name}"


def test_files_and_functions_stay_small():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, f"{path} has {text.count(chr(10))} lines: is there a second idea in it?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_nothing_is_called_utils():
    assert not [path for path in sources() if "util" in path.stem or path.stem in ("helpers", "misc", "common")]
