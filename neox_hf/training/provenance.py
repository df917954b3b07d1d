"""Where a run came from: its resolved recipe, the versions it ran with, and the state of its source tree."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from neox_hf.version import versions


def run_documents(recipe: dict[str, Any]) -> dict[str, str]:
    """Text files that tell how to repeat a run, by name: `recipe.yaml` (resolved) and `run.json`."""
    facts = {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }
    return {
        "recipe.yaml": yaml.safe_dump(recipe, sort_keys=False),
        "run.json": json.dumps(facts, indent=2) + "\n",
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the tree that `folder` is in, and whether it has uncommitted changes; None outside a repository."""
    if shutil.which("git") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
