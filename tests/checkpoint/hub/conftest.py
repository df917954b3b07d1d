"""A loopback Hub that the real client of this process talks to, and small checkpoints to publish."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import save_file

from neox_hf.checkpoint.settings import HubSettings
from tests.hub_server import TOKEN, HubServer

REPO = "tester/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server; `huggingface_hub` finds it as its endpoint, with a valid token and without Xet."""
    with HubServer(TOKEN) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
    enable_progress_bars()
    set_client_factory(default_client_factory)  # without the publisher's time limit


@pytest.fixture
def settings() -> HubSettings:
    """Impatient, so that tests of faults end soon."""
    return HubSettings(push=True, repo_id=REPO, timeout=5.0, attempts=3, retry_wait=0.02)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    """Makes `checkpoint-N`: a tiny model directory whose weights depend on N, with everything that must stay behind."""

    def make(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True)
        save_file({"embed_out.weight": torch.full((8, 4), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "step": step}))
        (folder / "tokenizer.json").write_text("{}")
        for private in (
            "state/optimizer.safetensors",
            "training_args.bin",
            "pytorch_model.bin",
            "manifest.json",
            ".env",
        ):
            (folder / private).write_bytes(b"stays here")
        return folder

    return make
