"""Evaluation and the checkpoints it decides on: figures checked by hand, the best model, schedules, stock loading."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockGPTNeoX
from transformers.trainer_utils import EvalLoopOutput

from neox_hf.data import EvaluationBatches, TokenStream, evaluation_batches
from neox_hf.data.settings import DataSettings, SourceSettings
from neox_hf.data.tokenization import byte_tokenizer
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.training import save_schedule
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.runs import Runs, write_corpus

VOCAB = 384


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Eight steps on one rank, evaluated before the first, after four and at the end; saved at each of these."""
    runs = Runs(tmp_path_factory.mktemp("evaluation"))
    assert runs.run("one", *EVALUATED, "train.per_device_train_batch_size=2") == [0], runs.message("one")
    return runs


EVALUATED = [
    "train.eval_on_start=true",
    "train.eval_strategy=steps",
    "train.eval_steps=4",
    "train.save_schedule=[0, 4]",
    "train.per_device_eval_batch_size=2",
    "model.hidden_dropout=0",
]


def eval_rows(log: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in log if "eval_loss" in row}


def batches(corpus: Path, samples: int = 4) -> EvaluationBatches:
    return evaluation_batches(data_settings(corpus, samples), byte_tokenizer(), batch_size=2, vocab_size=VOCAB)


def data_settings(corpus: Path, samples: int = 4) -> DataSettings:
    source = SourceSettings(path=str(corpus))
    return DataSettings(sources=[source], seq_length=32, streams=4, eval_fraction=0.2, eval_samples=samples)


def loss_by_hand(model: torch.nn.Module, held_out: EvaluationBatches) -> float:
    """The mean over every label of every batch, summed in double precision."""
    total, labels = 0.0, 0
    with torch.no_grad():
        for batch in held_out:
            logits = model(input_ids=batch["input_ids"]).logits.double()
            wanted = batch["shift_labels"].flatten()
            total += cross_entropy(logits.flatten(0, 1), wanted, reduction="sum").item()
            labels += int((wanted != -100).sum())
    return total / labels


@pytest.mark.parametrize("step", [0, 4, 8])
def test_the_loss_is_what_stock_transformers_gets_from_the_checkpoint(runs, step):
    model = StockGPTNeoX.from_pretrained(runs.folder / "one" / f"checkpoint-{step}").eval()
    row = eval_rows(runs.log_history("one", 8))[step]
    assert row["eval_loss"] == pytest.approx(loss_by_hand(model, batches(runs.corpus)), rel=1e-6)
    assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]), rel=1e-12)


def test_it_begins_near_the_entropy_of_the_vocabulary_and_falls(runs):
    losses = [row["eval_loss"] for row in eval_rows(runs.log_history("one", 8)).values()]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert losses[2] < losses[1] < losses[0]
    drop = 100 * (1 - losses[2] / losses[0])
    line = f"evaluation loss: {losses[0]:.4f} -> {losses[2]:.4f} ({drop:.1f} % lower)"
    assert line in runs.message("one")


def test_two_ranks_get_the_same_loss(runs):
    options = [*EVALUATED, "train.per_device_train_batch_size=1", "train.per_device_eval_batch_size=1"]
    assert runs.run("two", *options, world_size=2) == [0, 0], runs.message("two", 1)
    one, two = (eval_rows(runs.log_history(name, 8)) for name in ("one", "two"))
    assert two[0]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-6)
    assert [row["eval_loss"] for row in two.values()] == pytest.approx(
        [row["eval_loss"] for row in one.values()], rel=1e-5
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_label_weighs_the_same_where_documents_end(runs, world_size):
    name = f"masked-{world_size}"
    rows = f"train.per_device_eval_batch_size={2 // world_size}"
    options = [*EVALUATED, rows, "data={eod_mask_loss: true, eval_samples: 16}", "train.gradient_accumulation_steps=1"]
    assert runs.run(name, *options, world_size=world_size) == [0] * world_size, runs.message(name)
    model = StockGPTNeoX.from_pretrained(runs.folder / name / "checkpoint-8").eval()
    settings = replace(data_settings(runs.corpus, samples=16), eod_mask_loss=True)
    held_out = evaluation_batches(settings, byte_tokenizer(), batch_size=2, vocab_size=VOCAB)
    counts = {int((batch["shift_labels"] != -100).sum()) for batch in held_out}
    assert len(counts) > 1, "batches with equally many labels would show nothing"
    found = eval_rows(runs.log_history(name, 8))[8]["eval_loss"]
    assert found == pytest.approx(loss_by_hand(model, held_out), rel=1e-6)


def test_stock_transformers_gets_the_same_logits(runs):
    folder = runs.folder / "one" / "checkpoint-8"
    stock, report = StockGPTNeoX.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    ours = GPTNeoXForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 256, (2, 32))
    with torch.no_grad():
        assert (stock.eval()(tokens).logits - ours.eval()(tokens).logits).abs().max() <= 1e-5
    assert stock.config.model_type == "gpt_neox"


# Checkpoints around it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def make_trainer(output_dir: Path, corpus: Path, callbacks: list | None = None, **given: Any) -> NeoXTrainer:
    """A trainer built by hand, as a user of the class does."""
    values = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}
    values |= {"precision": "fp32", "peak_tflops": 1.0, "disable_tqdm": True, "logging_steps": 1, **given}
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        bos_token_id=256,
        eos_token_id=256,
    )
    return NeoXTrainer(
        GPTNeoXForCausalLM(config),
        NeoXTrainingArguments(output_dir=str(output_dir), use_cpu=True, **values),
        train_dataset=TokenStream(data_settings(corpus), byte_tokenizer(), split="train", vocab_size=VOCAB),
        eval_dataset=batches(corpus),
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
    )


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))


def script_losses(trainer: NeoXTrainer, losses: list[float]) -> None:
    """Let the evaluations find `losses`, one after the other."""
    script = iter(losses)

    def evaluate(batches: Any, *args: Any, **loop: Any) -> EvalLoopOutput:
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={"eval_loss": next(script)}, num_samples=4)

    trainer.engine.evaluate = evaluate


def test_the_best_model_comes_back_and_early_stopping_stops(tmp_path, corpus):
    trainer = make_trainer(
        tmp_path,
        corpus,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        max_steps=100,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    script_losses(trainer, [5.0, 4.0, 3.0, 3.5, 3.6])
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert steps_saved(tmp_path) == [6, 10]
    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    trainer.save_model(str(tmp_path / "final"))
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert [name for name in best if not torch.equal(best[name], final[name])] == []


def test_the_best_checkpoint_is_the_only_one_kept_where_one_is_kept(tmp_path, corpus):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, corpus, **options)
    script_losses(trainer, [5.0, 3.0, 4.0, 4.5])
    trainer.train()
    assert steps_saved(tmp_path) == [4]


def test_steps_of_the_schedule_are_kept_beside_it(tmp_path, corpus):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, corpus, save_schedule=[2, 4, 5], greater_is_better=False, **options)
    script_losses(trainer, [5.0, 3.0, 4.0, 4.5])
    trainer.train()
    assert steps_saved(tmp_path) == [2, 4, 5, 8]


def test_saving_only_the_best(tmp_path, corpus):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, corpus, greater_is_better=False, **options)
    script_losses(trainer, [5.0, 5.5, 4.0, 4.5])
    trainer.train()
    assert steps_saved(tmp_path) == [2, 6]


@pytest.mark.parametrize(
    ("schedule", "saved"),
    [("pythia", [0, 1, 2, 4, 8]), ([0, 3], [0, 3, 8]), ([5], [5, 8]), ("none", []), ("every", [2, 4, 6, 8])],
)
def test_schedules_save_their_steps(tmp_path, corpus, schedule, saved):
    strategy = "steps" if schedule == "every" else "no"
    make_trainer(tmp_path, corpus, save_schedule=schedule, save_strategy=strategy).train()
    assert steps_saved(tmp_path) == saved


def test_rotation_keeps_the_log_spaced_checkpoints(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(save_schedule, "PYTHIA_INTERVAL", 3)
    make_trainer(tmp_path, corpus, save_schedule="pythia", save_strategy="no", save_total_limit=1).train()
    assert steps_saved(tmp_path) == [0, 1, 2, 4, 6, 8], "of 3 and 6, the steps of the interval, the newer"


def test_a_resumed_log_holds_every_evaluation(tmp_path, corpus):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    whole = make_trainer(tmp_path, corpus, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", corpus, **options)
    resumed.train(str(tmp_path / "checkpoint-4"))
    wanted = {step: row["eval_loss"] for step, row in eval_rows(whole.state.log_history).items()}
    assert list(wanted) == [2, 4, 6, 8]
    assert {step: row["eval_loss"] for step, row in eval_rows(resumed.state.log_history).items()} == wanted


def test_z_loss_is_trained_on_and_not_evaluated(tmp_path, corpus):
    logs = {}
    for z_loss in (0.0, 0.1):
        trainer = make_trainer(tmp_path / str(z_loss), corpus, z_loss=z_loss, max_steps=1, learning_rate=0.0)
        trainer.train()
        logs[z_loss] = trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]
    assert logs[0.1][0] > logs[0.0][0] + 0.5  # a tenth of log(V)^2
    assert logs[0.1][1] == logs[0.0][1]
