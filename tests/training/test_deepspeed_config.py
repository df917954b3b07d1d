"""What the recipe comes to in DeepSpeed's terms: every value written out, accepted by DeepSpeed, and none too many."""

from types import SimpleNamespace

import pytest

from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.topology import Topology
from neox_hf.training.deepspeed_config import deepspeed_config


def config(parallel: ParallelSettings, precision: str = "fp32", data: int = 2) -> dict | None:
    topology = Topology(tensor=parallel.tensor, pipeline=parallel.pipeline, data=data)
    train = SimpleNamespace(per_device_train_batch_size=3, max_grad_norm=0, precision=precision)
    return deepspeed_config(train, parallel, topology, 5)


def leaves(values: dict):
    for value in values.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def test_plain_data_parallelism_does_without():
    assert config(ParallelSettings()) is None
    assert config(ParallelSettings(sequence=True)) is None


@pytest.mark.parametrize(
    ("parallel", "stage"),
    [
        (ParallelSettings(zero_stage=1), 1),
        (ParallelSettings(zero_stage=2), 2),
        (ParallelSettings(zero_stage=3), 3),
        (ParallelSettings(tensor=2), 1),
        (ParallelSettings(pipeline=2), 1),
        (ParallelSettings(pipeline=2, tensor=2, zero_stage=1), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_is_left_to_be_filled_in(parallel, stage, precision):
    """But the batch of all ranks, which DeepSpeed alone derives from its own data-parallel size."""
    made = config(parallel, precision)
    assert "auto" not in [*leaves(made)]
    assert "train_batch_size" not in made
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (3, 5)
    assert (made["gradient_clipping"], made["zero_optimization"]["stage"]) == (0.0, stage)
    assert (made["data_types"]["grad_accum_dtype"], made["communication_data_type"]) == ("fp32", "fp32")
    assert {name for name in ("bf16", "fp16") if name in made} == {precision} - {"fp32"}
    numbers = [
        value for name, value in made["zero_optimization"].items() if "size" in name or name.startswith("stage3_m")
    ]
    assert all(type(number) is int for number in numbers)


def test_automatic_precision_is_the_host_s(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert config(ParallelSettings(zero_stage=1), "auto")["bf16"]["enabled"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "bf16" not in config(ParallelSettings(zero_stage=1), "auto")


def test_communication_overlaps_where_it_can():
    assert config(ParallelSettings(zero_stage=2))["zero_optimization"]["overlap_comm"] is True
    assert config(ParallelSettings(zero_stage=2), data=1)["zero_optimization"]["overlap_comm"] is False
    assert config(ParallelSettings(pipeline=2))["zero_optimization"]["overlap_comm"] is False


def test_offloading_takes_the_optimizer_alone():
    section = config(ParallelSettings(zero_stage=3, offload="optimizer"))["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in section
    assert "offload_optimizer" not in config(ParallelSettings(zero_stage=3))["zero_optimization"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_knows_every_key(precision):
    """It keeps quiet about unknown keys of its top level, and refuses them in its sections."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for parallel in (ParallelSettings(zero_stage=3, offload="optimizer"), ParallelSettings(zero_stage=1)):
        made = config(parallel, precision)
        DeepSpeedZeroConfig(**made["zero_optimization"])
        DeepSpeedBF16Config(**made.get("bf16", {}))
        DeepSpeedFP16Config(**made.get("fp16", {}))
