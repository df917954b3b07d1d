"""Package metadata. Tool settings are in pyproject.toml; the tested versions are pinned in constraints.txt."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",
    "transformers>=5.23,<6",
    "accelerate>=1.15",
    "deepspeed>=0.19.8",
    "datasets>=5.2",
    "tokenizers>=0.22",
    "evaluate>=0.4.6",
    "huggingface-hub>=1.31,<3",
    "safetensors>=0.8",
    "wandb>=0.24",
    "pydantic>=2.11",
    "pyyaml>=6.0.2",
    "numpy>=2.0",
    "matplotlib>=3.10",
    "tensorboard>=2.19",
    "zstandard>=0.23",
    "ninja>=1.11",
]

EXTRAS = {
    "eval": ["lm-eval>=0.4.13"],
    "finetune": ["peft>=0.21", "trl>=1.16"],
    # Those that were tried: kernels/attention.py and kernels/fused_product.py use no others.
    "hopper": ["flash-attn-4[cu13]==4.0.0b36", "quack-kernels==0.6.5"],
    "bench": ["liger-kernel==0.8.5"],
    "dev": ["pytest>=8", "pytest-cov>=6", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.17", "peft>=0.21"],
}

setup(
    name="neox_hf",
    version=runpy.run_path(str(Path(__file__).with_name("neox_hf") / "version.py"))["VERSION"],
    description="GPT-NeoX inside the Hugging Face ecosystem: pretraining without a conversion step",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["neox_hf", "neox_hf.*"]),
    package_data={"neox_hf": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
