"""What we write loads in a process that knows transformers alone: a model we save, a checkpoint, revisions of the Hub.

One process loads all of them, since it imports for seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from neox_hf.checkpoint import CheckpointWriter
from neox_hf.checkpoint.hub import HubPublisher
from tests.checkpoint.conftest import SIZES, build, small_tokenizer

LOAD_ALL = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sources, tokens, found = json.loads(sys.argv[1]), torch.arange(8)[None], {}
for name, source in sources.items():
    model, report = AutoModelForCausalLM.from_pretrained(**source, output_loading_info=True)
    assert type(model).__module__.startswith("transformers."), type(model)
    assert not any(report.values()), report
    found[name] = {"weights": model.state_dict(), "logits": model.eval()(tokens).logits.detach()}
words = len(AutoTokenizer.from_pretrained(sources["checkpoint"]["pretrained_model_name_or_path"]))
assert "neox_hf" not in sys.modules
torch.save({"models": found, "words": words}, sys.argv[2])
"""


def write_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    writer = CheckpointWriter(folder, 1)
    writer.write_weights(model, tokenizer=small_tokenizer())
    return writer.commit()


def publish(models: dict[str, PreTrainedModel], settings: Any, folder: Path) -> None:
    """Each as a step, and the last as the final model."""
    publisher = HubPublisher(settings, folder)
    for step, model in enumerate(models.values(), start=1):
        model.save_pretrained(folder / f"step{step}")
        publisher.publish_step(folder / f"step{step}", step)
    publisher.publish_final(folder / f"step{step}")
    assert publisher.close(60).pushed == [*models, "main"]


def load_elsewhere(sources: dict[str, dict[str, str]], url: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD_ALL, json.dumps(sources), str(folder / "found.pt")]
    loaded = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    return torch.load(folder / "found.pt")


def test_what_we_write_loads_in_stock_transformers(hub, settings, tmp_path):
    revisions = {f"step{step}": build("stock", seed=step) for step in (1, 2)}
    publish(revisions, settings, tmp_path)
    revisions["main"] = revisions["step2"]
    models = {
        "saved": build("ours", seed=3, init_method="small_init", kernels="torch"),
        "checkpoint": build("ours", seed=4),
        **revisions,
    }
    models["saved"].save_pretrained(tmp_path / "saved")
    places = {"saved": tmp_path / "saved", "checkpoint": write_checkpoint(models["checkpoint"], tmp_path / "run")}
    sources = {name: {"pretrained_model_name_or_path": str(place)} for name, place in places.items()}
    sources |= {
        revision: {"pretrained_model_name_or_path": "tester/tiny", "revision": revision} for revision in revisions
    }

    found = load_elsewhere(sources, hub.url, tmp_path)
    assert found["words"] == SIZES["vocab_size"]
    for name, model in models.items():
        weights, loaded = model.state_dict(), found["models"][name]
        assert weights.keys() == loaded["weights"].keys()
        assert [key for key in weights if not torch.equal(weights[key], loaded["weights"][key])] == [], name
        torch.testing.assert_close(
            loaded["logits"], model.eval()(torch.arange(8)[None]).logits, rtol=0, atol=1e-5, msg=name
        )
