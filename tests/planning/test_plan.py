"""Plans of typical recipes: what the parts are, how they change with the layout, and how it is told."""

import dataclasses
from pathlib import Path

import pytest

from neox_hf.config import Document, build, read_yaml
from neox_hf.errors import RecipeError, TopologyError
from neox_hf.planning import DEVICES, Job, device_called, memory_of_stages, plan, plan_report, step_of
from neox_hf.training.dry_run import dry_run_report
from neox_hf.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
H200 = DEVICES["H200"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe([f"{name}.yaml"], str(RECIPES), ["train.eval_strategy=no", *overrides])


def job_of(*overrides: str, world_size: int = 1, name: str = "pythia_1.4b") -> Job:
    settings = [
        "train.eval_on_start=false",
        "train.global_batch_size=64",
        "train.per_device_train_batch_size=4",
        "train.precision=bf16",
    ]
    return Job.of(recipe_of(name, *settings, *overrides), world_size)


@pytest.mark.parametrize(
    ("name", "world_size", "stages"),
    [("demo", 1, 1), ("pythia_1.4b", 8, 1), ("neox_20b", 96, 4), ("gpt3_175b", 96, 12)],
)
def test_shipped_recipes_fit_their_devices(name, world_size, stages):
    found = plan(recipe_of(name), world_size, H200)
    assert len(found.memory) == stages
    assert found.fits
    assert 0 < found.step.tflops_per_device < H200.matmul_tflops[2]
    assert sum(found.step.parts.values()) == pytest.approx(found.step.seconds)
    assert str(found).startswith("on H200: ")


@pytest.mark.parametrize(
    ("zero_stage", "per_parameter"),
    [(0, 6 + 10 / 4), (1, 6 + 10 / 4), (2, 2 + 16 / 4), (3, 18 / 4)],
)
def test_bytes_of_a_parameter_are_those_of_the_documentation(zero_stage, per_parameter):
    job = job_of(f"parallel.zero_stage={zero_stage}", world_size=4)
    (memory,) = memory_of_stages(job)
    held = (memory.weights + memory.gradients + memory.optimizer) * 2**30
    assert held == pytest.approx(per_parameter * job.held[0])


def test_replicas_among_whom_the_matrices_do_not_divide_keep_all_of_the_state():
    samples = "train.global_batch_size=48"
    alone, two, three = (memory_of_stages(job_of(samples, world_size=size))[0].optimizer for size in (1, 2, 3))
    assert alone == three == 2 * two


@pytest.mark.parametrize("setting", ["train.optim=adamw_torch", "model.kernels=torch"])
def test_torchs_step_needs_whole_masters_in_deepspeeds_hands_alone(setting):
    for layout, per_parameter in ((1, 16), (2, 18)):
        job = job_of(setting, f"parallel.tensor={layout}", world_size=layout)
        (memory,) = memory_of_stages(job)
        held = (memory.weights + memory.gradients + memory.optimizer) * 2**30
        assert held == pytest.approx(per_parameter * job.held[0])
        quick = job_of(f"parallel.tensor={layout}", world_size=layout)
        assert step_of(job, H200).parts["optimizer"] > 1.3 * step_of(quick, H200).parts["optimizer"]


def test_offloading_leaves_weights_and_gradients():
    (stays,) = memory_of_stages(job_of("parallel.zero_stage=1", world_size=2))
    job = job_of("parallel={zero_stage: 1, offload: optimizer}", world_size=2)
    (offloaded,) = memory_of_stages(job)
    assert (offloaded.weights, offloaded.optimizer) == (stays.weights, 0)
    assert step_of(job, H200).parts["optimizer"] > 10 * step_of(job_of(world_size=2), H200).parts["optimizer"]


@pytest.mark.parametrize(
    ("precision", "weights", "gradients", "optimizer"),
    [("fp32", 4, 4, 8), ("bf16", 2, 4, 10), ("pure_bf16", 2, 2, 4), ("amp", 4, 4, 8), ("fp8", 2, 4, 10)],
)
def test_precisions(precision, weights, gradients, optimizer):
    job = job_of(f"train.precision={precision}")
    (memory,) = memory_of_stages(job)
    copies = {"amp": 2, "fp8": 2}.get(precision, 0) * job.matrices(0)
    assert memory.weights * 2**30 == weights * job.held[0] + copies
    assert memory.gradients * 2**30 == gradients * job.held[0]
    assert memory.optimizer * 2**30 == optimizer * job.held[0]


def test_auto_is_what_it_is_on_a_gpu():
    assert job_of("train.precision=auto") == job_of("train.precision=bf16")


def test_each_recomputation_keeps_less_and_takes_longer():
    jobs = [job_of(f"train.activation_checkpointing={mode}") for mode in ("none", "selective", "full")]
    kept = [memory_of_stages(job)[0].activations for job in jobs]
    seconds = [step_of(job, H200).seconds for job in jobs]
    assert kept == sorted(kept, reverse=True)
    assert seconds == sorted(seconds)
    # none keeps 30 bytes x hidden of a token and layer, selective 18 of them
    assert kept[1] / kept[0] == pytest.approx(18 / 30, rel=0.01)


def test_torch_s_selective_form_keeps_one_product_more():
    by_kernels = memory_of_stages(job_of("train.activation_checkpointing=selective"))[0]
    by_torch = memory_of_stages(
        job_of("train.activation_checkpointing=selective", "parallel.zero_stage=2", world_size=2)
    )[0]
    assert by_torch.activations > by_kernels.activations


def test_written_out_attention_keeps_its_weights():
    eager = job_of("model={name: pythia-1.4b, attn_implementation: eager}")
    kept, usual = (memory_of_stages(job)[0].activations for job in (eager, job_of()))
    assert (kept - usual) * 2**30 == 24 * 16 * 2048 * 2 * eager.tokens  # layers, heads, keys, bytes


def test_sequence_parallelism_spares_memory_and_sends_more():
    split = job_of("parallel.tensor=2", world_size=2)
    sequence = job_of("parallel={tensor: 2, sequence: true}", world_size=2)
    assert memory_of_stages(sequence)[0].activations < memory_of_stages(split)[0].activations
    assert step_of(sequence, H200).parts["messages"] > step_of(split, H200).parts["messages"]


def test_the_first_stage_keeps_most_micro_batches():
    memories = memory_of_stages(job_of("parallel.pipeline=4", world_size=4))
    kept = [memory.activations for memory in memories]
    assert kept == sorted(kept, reverse=True)
    assert memories[0].loss == 0 < memories[-1].loss


def four_stages(*overrides: str) -> Job:
    """Alike: without a head to speak of."""
    small = "model={num_hidden_layers: 8, hidden_size: 2048, num_attention_heads: 16, vocab_size: 384}"
    return job_of(small, "parallel.pipeline=4", "tokenizer.vocab_size=384", *overrides, world_size=4, name="demo")


def test_the_bubble_is_the_textbook_s():
    """With stages alike, (p - 1) / (m + p - 1)."""
    job = four_stages("train.activation_checkpointing=selective")
    assert step_of(job, H200).bubble == pytest.approx(3 / (job.accumulation + 3), rel=0.02)
    uneven = dataclasses.replace(job, layers=(2, 2, 1, 3))
    assert step_of(uneven, H200).bubble > 1.5 * step_of(job, H200).bubble


def test_it_is_smaller_where_gradients_go_back_before_those_of_weights_are_there(monkeypatch):
    job = four_stages()
    assert job.splits_backward
    split = step_of(job, H200).parts
    monkeypatch.setattr(Job, "splits_backward", False)
    whole = step_of(job, H200).parts
    products = split["products"] / job.accumulation
    assert whole["bubble"] - split["bubble"] == pytest.approx(3 * products / 3)  # three stages, a third of the products


def test_a_sequential_residual_sends_twice_as_often():
    once, twice = (
        job_of(f"model={{name: pythia-1.4b, use_parallel_residual: {residual}}}", "parallel.tensor=8", world_size=8)
        for residual in ("true", "false")
    )
    assert step_of(twice, H200).parts["messages"] > 1.5 * step_of(once, H200).parts["messages"]
    assert step_of(twice, H200).parts["kernels"] > step_of(once, H200).parts["kernels"]
    assert memory_of_stages(twice)[0].activations > memory_of_stages(once)[0].activations


def test_replicas_of_several_hosts_talk_through_the_network():
    inside, outside = (job_of(world_size=ranks, name="demo") for ranks in (8, 16))
    assert step_of(outside, H200).parts["gradients"] > step_of(inside, H200).parts["gradients"]
    assert step_of(job_of(), H200).parts["gradients"] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_partitioned_gradients_travel_with_every_micro_batch(stage):
    job = job_of(f"parallel.zero_stage={stage}", world_size=2)
    (memory,) = memory_of_stages(job)
    assert memory.messages > 0
    assert step_of(job, H200).parts["messages"] > 0


def test_the_lines_of_a_dry_run_are_still_a_recipe():
    recipe = recipe_of("neox_20b")
    text = plan_report(recipe)
    assert text.startswith("# on H200:       ")
    assert "GiB at the peak of a rank of stage 0" in text
    assert "TFLOP/s a device" in text.splitlines()[1]
    values, origins = read_yaml(f"{dry_run_report(recipe)}\n{text}", str)
    assert build(Recipe, Document(values, origins)) == recipe


def test_what_does_not_fit_has_no_speed():
    lines = plan(recipe_of("neox_20b", "parallel={tensor: 1, pipeline: 1}"), 1, H200).lines()
    assert "it does not fit" in lines["on H200"]
    assert lines["speed"] == "-"


OPEN = """
model: {pretrained: me/it}
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}]}
train: {max_steps: 1}
"""


def test_a_recipe_that_leaves_the_model_open(tmp_path):
    path = tmp_path / "open.yaml"
    path.write_text(OPEN)
    recipe = load_recipe([str(path)])
    with pytest.raises(
        RecipeError, match=r"does not tell \(those of me/it\); plan one that has model.name or model.voc"
    ):
        plan(recipe, 1, H200)
    assert "which the recipe alone does not tell" in plan_report(recipe)


def test_a_world_that_does_not_fit():
    with pytest.raises(TopologyError, match="takes 8"):
        plan(recipe_of("neox_20b"), 4, H200)


def test_devices_by_name():
    assert device_called("NVIDIA H200") is H200
    assert device_called("NVIDIA H100 80GB HBM3").gib < H200.gib
    with pytest.raises(RecipeError, match=r"device 'H20' is unknown. Did you mean 'H200'\? Choose one of H200, H100"):
        device_called("H20")


def test_small_heads_leave_units_idle():
    assert H200.attention_at(256) == H200.attention_at(128) > H200.attention_at(96) == H200.attention_at(64)
    assert H200.attention_at(32) == H200.attention_at(64) / 2
