"""What was published loads by its revision in a process that knows transformers alone."""

import json
import os
import subprocess
import sys

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from neox_hf.checkpoint.hub import HubPublisher

LOAD_ALL = """
import json, sys
from transformers import AutoModelForCausalLM
sums = {}
for revision in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained("tester/tiny", revision=revision)
    assert type(model).__module__.startswith("transformers.")
    sums[revision] = [float(value.double().sum()) for value in model.state_dict().values()]
assert "neox_hf" not in sys.modules
print(json.dumps(sums))
"""


def test_every_revision_loads_in_stock_transformers(hub, settings, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    publisher = HubPublisher(settings, tmp_path)
    expected = {}
    for step in (1, 4):
        torch.manual_seed(step)
        model = GPTNeoXForCausalLM(config)
        folder = tmp_path / f"checkpoint-{step}"
        model.save_pretrained(folder)
        publisher.publish_step(folder, step)
        expected[f"step{step}"] = [float(value.double().sum()) for value in model.state_dict().values()]
    publisher.publish_final(folder)
    expected["main"] = expected["step4"]
    assert publisher.close(60).pushed == list(expected)

    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, json.dumps(list(expected))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout.splitlines()[-1]) == expected
