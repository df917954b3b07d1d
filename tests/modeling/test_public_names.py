"""What `import neox_hf` gives, and what it leaves alone."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import neox_hf


def test_every_public_name_exists():
    assert set(neox_hf.__all__) <= set(dir(neox_hf))
    for name in neox_hf.__all__:
        assert getattr(neox_hf, name) is not None


def test_version_is_the_package_s():
    assert neox_hf.__version__ == version("neox_hf")


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'neox_hf' has no attribute 'NeoxTrainer'"):
        _ = neox_hf.NeoxTrainer


def test_importing_the_model_imports_no_trainer():
    script = (
        "import sys, neox_hf\n"
        "heavy = ['deepspeed', 'datasets', 'wandb', 'neox_hf.training', 'matplotlib']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
