"""What a run does beside its steps is the same for a split model: stops, evaluations, steps that are not finite."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockGPTNeoX

from neox_hf.data import evaluation_batches
from neox_hf.data.settings import DataSettings, SourceSettings
from neox_hf.data.tokenization import byte_tokenizer
from tests.runs import Runs

PP2, TP2 = "parallel.pipeline=2", "parallel.tensor=2"
OPTIMIZER = "state/optimizer*.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("pipeline-runs"))


def run(runs: Runs, name: str, *overrides: str, code: int = 0, world_size: int = 2, **options) -> None:
    found = runs.run(name, *overrides, world_size=world_size, **options)
    told = "\n".join(runs.message(name, rank)[-2500:] for rank in range(world_size))
    assert found == [code] * world_size, told


def tensors(folder: Path, pattern: str = "model*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of the files of a checkpoint that match, whichever rank wrote them."""
    return {f"{path.name}:{key}": value for path in folder.glob(pattern) for key, value in load_file(path).items()}


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one, "there is nothing to compare"
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


def final_log(runs: Runs, name: str) -> list[dict[str, float]]:
    return json.loads((runs.folder / name / "trainer_state.json").read_text())["log_history"]


def by_step(log: list[dict[str, float]], key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log if key in entry}


# Stops


def signal_in_step(rank: int, at_step: int, on_rank: int) -> None:
    """Receive SIGTERM in the middle of a step, on one rank only."""
    import os

    from neox_hf.training.trainer import NeoXTrainer

    stock = NeoXTrainer.training_step

    def training_step(trainer, *args):
        if rank == on_rank and trainer.state.global_step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(trainer, *args)

    NeoXTrainer.training_step = training_step


@pytest.mark.parametrize("layout", [PP2, pytest.param(TP2, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(runs, layout):
    name, how = f"stopped-{layout[9]}", "train.precision=bf16"
    run(runs, f"{name}-whole", layout, how)
    run(runs, name, layout, how, code=143, prepare=signal_in_step, at_step=3, on_rank=1)
    assert (runs.folder / name / "checkpoint-4").is_dir()
    run(runs, name, layout, how)
    whole, resumed = runs.folder / f"{name}-whole" / "checkpoint-8", runs.folder / name / "checkpoint-8"
    assert different(tensors(whole), tensors(resumed)) == []
    assert different(tensors(whole, OPTIMIZER), tensors(resumed, OPTIMIZER)) == []
    assert by_step(final_log(runs, name), "loss") == by_step(final_log(runs, f"{name}-whole"), "loss")
    assert "'loss'" not in runs.message(name, 1), "the log is rank 0's alone"


# Steps that are not finite


def spoil_a_gradient(rank: int, at_steps: list[int], on_rank: int) -> None:
    """Put a NaN into one gradient of some steps, on one rank only."""
    from neox_hf.training.pipeline_engine import PipelineEngine

    stock = PipelineEngine.prepare

    def prepare(engine, model):
        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.nan if engine.trainer.state.global_step + 1 in at_steps else gradient

        if rank == on_rank:
            engine.stage.layers[0].mlp.dense_h_to_4h.weight.register_hook(spoilt)
        return stock(engine, model)

    PipelineEngine.prepare = prepare


@pytest.mark.parametrize(("layout", "precision"), [(PP2, "fp32"), (TP2, "bf16")])
def test_a_step_that_is_not_finite_is_dropped_on_every_rank(runs, layout, precision):
    name, how = f"nan-{layout[9]}-{precision}", [layout, f"train.precision={precision}", "train.save_steps=1"]
    run(runs, name, *how, "train.nan_policy=skip", prepare=spoil_a_gradient, at_steps=[4], on_rank=1)
    before, after = (runs.folder / name / f"checkpoint-{step}" for step in (3, 4))
    assert different(tensors(before), tensors(after)) == []
    assert different(tensors(before, OPTIMIZER), tensors(after, OPTIMIZER)) == []
    log = final_log(runs, name)
    assert by_step(log, "skipped_steps")[8] == 1
    run(runs, f"{name}-alone", *how[1:], world_size=1)
    assert by_step(log, "learning_rate") == by_step(final_log(runs, f"{name}-alone"), "learning_rate")
    assert different(tensors(after), tensors(runs.folder / name / "checkpoint-5")) != []


def test_a_step_that_is_not_finite_ends_the_run(runs):
    run(runs, "nan", PP2, code=4, prepare=spoil_a_gradient, at_steps=[4], on_rank=1)
    assert "step 4: the gradient norm is inf; the last checkpoint is unharmed" in runs.message("nan")
    assert sorted(path.name for path in (runs.folder / "nan").glob("checkpoint-*")) == ["checkpoint-2"]


# Evaluation

EVALUATED = [
    "train={eval_strategy: steps, eval_steps: 4, eval_on_start: true, per_device_eval_batch_size: 4}",
    "data={eval_samples: 16, eod_mask_loss: true}",
    "model.hidden_dropout=0",
]


def evaluate_first(rank: int) -> None:
    """Evaluate before training, too."""
    from neox_hf.training.trainer import NeoXTrainer

    stock = NeoXTrainer.train

    def train(trainer, *args, **kwargs):
        print("before training:", trainer.evaluate()["eval_loss"])
        output = stock(trainer, *args, **kwargs)
        print("after training:", trainer.evaluate()["eval_loss"])
        return output

    NeoXTrainer.train = train


def loss_by_hand(runs: Runs, folder: Path) -> float:
    """The mean over every label of the evaluation set, of the checkpoint in stock transformers."""
    settings = DataSettings(
        sources=[SourceSettings(path=str(runs.corpus))],
        seq_length=32,
        streams=4,
        eval_fraction=0.2,
        eval_samples=16,
        eod_mask_loss=True,
    )
    model, total, labels = StockGPTNeoX.from_pretrained(folder).eval(), 0.0, 0
    with torch.no_grad():
        for batch in evaluation_batches(settings, byte_tokenizer(), batch_size=4, vocab_size=384):
            wanted = batch["shift_labels"].flatten()
            logits = model(input_ids=batch["input_ids"]).logits.double().flatten(0, 1)
            total += cross_entropy(logits, wanted, reduction="sum").item()
            labels += int((wanted != -100).sum())
    return total / labels


@pytest.mark.parametrize(("layout", "world_size"), [(PP2, 4), pytest.param(TP2, 2, marks=pytest.mark.slow)])
def test_evaluations_weigh_every_label_alike(runs, layout, world_size):
    name = f"evaluated-{layout[9]}"
    run(runs, name, layout, *EVALUATED, world_size=world_size, prepare=evaluate_first)
    losses = by_step(final_log(runs, name), "eval_loss")
    assert list(losses) == [0, 4, 8]
    for step in (4, 8):
        by_hand = loss_by_hand(runs, runs.folder / name / f"checkpoint-{step}")
        assert losses[step] == pytest.approx(by_hand, rel=1e-6)
    told = dict(line.split(": ") for line in runs.message(name).splitlines() if " training: " in line)
    assert float(told["before training"]) == pytest.approx(losses[0], rel=1e-6)
    assert float(told["after training"]) == pytest.approx(losses[8], rel=1e-6)


def test_the_best_model_comes_back_and_early_stopping_stops(runs):
    """The rate falls off a cliff upwards, so that an early evaluation stays the best."""
    chosen = "train={eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true}"
    run(runs, "best", PP2, chosen, "train.lr_decay_style=constant", "train.learning_rate=0.5", prepare=stop_early)
    state = json.loads((runs.folder / "best" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    assert state["global_step"] == 4
    final, best = (tensors(folder) for folder in (runs.folder / "best", runs.folder / "best" / "checkpoint-2"))
    assert different(best, final) == []


def stop_early(rank: int) -> None:
    """Stop after the first evaluation that is no better."""
    from transformers import EarlyStoppingCallback

    from neox_hf.training.trainer import NeoXTrainer

    made = NeoXTrainer.__init__

    def init(trainer, *args, **kwargs):
        made(trainer, *args, **kwargs, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])

    NeoXTrainer.__init__ = init


# Figures and options


def test_tokens_and_work_are_counted_once(runs):
    run(runs, "counted-single", "model.hidden_dropout=0", world_size=1)
    run(runs, "counted", PP2, "model.hidden_dropout=0", "train.gradient_accumulation_steps=1", world_size=4)
    one, four = (
        json.loads((runs.folder / n / "trainer_state.json").read_text()) for n in ("counted-single", "counted")
    )
    assert four["num_input_tokens_seen"] == one["num_input_tokens_seen"] == 8 * 4 * 32
    assert four["total_flos"] == one["total_flos"]
    entry = next(entry for entry in four["log_history"] if entry["step"] == 8 and "loss" in entry)
    per_token = one["total_flos"] / one["num_input_tokens_seen"]
    assert entry["tflops_per_device"] == pytest.approx(entry["tokens_per_second"] / 4 * per_token / 1e12, abs=1e-4)


@pytest.mark.parametrize(
    "option",
    [
        "train.activation_checkpointing=full",
        "train.activation_checkpointing=selective",
        "train.torch_compile_backend=aot_eager",
    ],
)
def test_the_same_losses_with(runs, option):
    name = option.rpartition(".")[2]
    if not (runs.folder / "plain").exists():
        run(runs, "plain", PP2)
    run(runs, name, PP2, option)
    plain, found = (by_step(final_log(runs, one), "loss") for one in ("plain", name))
    assert list(found.values()) == pytest.approx(list(plain.values()), rel=1e-5)


@pytest.mark.parametrize("layout", [PP2, pytest.param(TP2, marks=pytest.mark.slow)])
def test_released_weights_start_a_split_model(runs, layout):
    if not (runs.folder / "plain").exists():
        run(runs, "plain", PP2)
    released = f"model={{pretrained: {runs.folder / 'plain'}, hidden_dropout: 0}}"
    theirs = [f"model.{size}=null" for size in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    losses = []
    for name, *split in (("from-one",), (f"from-{layout[9]}", layout)):
        run(runs, name, released, *theirs, *split, "train.max_steps=1", world_size=1 + len(split))
        losses.append(by_step(final_log(runs, name), "loss")[1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] < by_step(final_log(runs, "plain"), "loss")[1]
