"""Launches the peers of `layout_peers.py` on what one of our runs trains."""

import json
from pathlib import Path
from typing import Any

from layout_runs import TIMEOUT_SECONDS, Figures, Run, launch

from neox_hf.modeling.settings import model_config

PEERS = Path(__file__).with_name("layout_peers.py")
PEER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def run_peer(
    kind: str, run: Run, world: int, folder: Path, timeout: float = TIMEOUT_SECONDS, **options: Any
) -> Figures:
    """Run a peer with the model, micro-batch, samples and steps of `run`.

    kind, options: see `layout_peers.py`. A pipeline's ranks are one replica, others are each one.
    """
    result = folder / "result.json"
    job = peer_job(run, 1 if kind == "pipeline" else world, folder) | options
    figures = launch(world, [str(PEERS), kind, str(result), json.dumps(job)], result, timeout)
    return {**figures, "samples": run.samples} if figures else {}


def peer_job(run: Run, replicas: int, folder: Path) -> dict[str, Any]:
    """Fields of `layout_peers.Job`."""
    recipe = run.recipe(folder)
    config = model_config(recipe.model, tokens=recipe.tokenizer.vocab_size or 0, seq_length=recipe.data.seq_length)
    micro_batch = recipe.train.per_device_train_batch_size
    return {
        "model": {name: getattr(config, name) for name in PEER_FIELDS},
        "micro_batch": micro_batch,
        "accumulation": run.samples // micro_batch // replicas,
        "seq_length": recipe.data.seq_length,
        "steps": run.steps,
    }
