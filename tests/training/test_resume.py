"""What the recipe decides on resume and what the checkpoint does; and that two continuations never mix."""

import os
import shutil
import signal

import pytest

from tests.faults.test_interruptions import signal_self
from tests.runs import Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("resume"))
    stopped = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 3, "on_rank": 0}
    assert runs.run("first", **stopped) == [143], runs.message("first")
    return runs


def test_the_resuming_recipe_decides_rates_and_intervals(runs):
    changed = ["train.learning_rate=1e-5", "train.adam_beta2=0.9", "train.save_steps=3"]
    assert runs.run("first", *changed) == [0], runs.message("first")
    entries = {entry["step"]: entry for entry in runs.log_history("first", 8) if "learning_rate" in entry}
    assert entries[4]["learning_rate"] > 1e-3
    assert all(entries[step]["learning_rate"] <= 1e-5 for step in range(5, 9))
    saved = sorted(path.name for path in (runs.folder / "first").glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    message = runs.message("first")
    assert "resumed with initial_lr=1e-05; the checkpoint had 0.01" in message
    assert "resumed with betas=(0.9, 0.9); the checkpoint had (0.9, 0.999)" in message


def test_an_older_checkpoint_is_not_continued_beside_newer_ones(runs):
    assert runs.run("whole") == [0], runs.message("whole")
    older = runs.folder / "whole" / "checkpoint-4"
    assert runs.run("whole", f"train.resume_from_checkpoint={older}") == [6]
    assert "holds checkpoint-8, which is newer than checkpoint-4" in runs.message("whole")
    for step in (6, 8):
        (runs.folder / "whole" / f"checkpoint-{step}").rename(runs.folder / f"aside-{step}")
    assert runs.run("whole", f"train.resume_from_checkpoint={older}") == [0], runs.message("whole")


def test_nor_under_another_name(runs):
    assert runs.run("renamed") == [0], runs.message("renamed")
    kept = runs.folder / "kept"
    shutil.copytree(runs.folder / "renamed" / "checkpoint-2", kept)
    assert runs.run("renamed", f"train.resume_from_checkpoint={kept}") == [6]
    assert "holds checkpoint-8, which is newer than kept" in runs.message("renamed")


def nan_gradients(rank: int, first: int, last: int, stop_in: int | None = None) -> None:
    """The gradient norm is NaN in some steps; SIGTERM comes in one."""
    import torch

    from neox_hf.training.trainer import NeoXTrainer

    stock = NeoXTrainer._clip_grad_norm

    def clip(trainer, model):
        step, norm = trainer.state.global_step + 1, stock(trainer, model)
        if step == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(float("nan")) if first <= step <= last else norm

    NeoXTrainer._clip_grad_norm = clip


def test_skipped_steps_are_counted_on(runs):
    """Four in a row, the limit, with a stop behind the third."""
    policy = "train={nan_policy: skip, max_skipped_steps: 4}"
    assert runs.run("skipping", policy, prepare=nan_gradients, first=2, last=6, stop_in=4) == [143]
    assert runs.run("skipping", policy, prepare=nan_gradients, first=2, last=6) == [4]
    assert "makes 4 in a row" in runs.message("skipping")


@pytest.mark.parametrize("documents", ["true", "false"])
def test_kernels_may_change(documents, runs):
    """The same checkpoint, the same curve: three steps by kernels, in Triton's interpreter, and the rest by torch."""
    options = ["model.hidden_dropout=0", "model.attention_dropout=0"]  # whose masks differ
    options += [f"data.document_mask={documents}"]  # by torch with a mask of pairs
    stopped = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 2, "on_rank": 0}
    torch_alone, both = (f"{name}, documents {documents}" for name in ("torch", "both"))
    assert runs.run(torch_alone, "model.kernels=torch", *options) == [0], runs.message(torch_alone)
    assert runs.run(both, "model.kernels=triton", *options, **stopped) == [143], runs.message(both)
    assert runs.run(both, "model.kernels=torch", *options) == [0], runs.message(both)
    by_torch, by_both = (losses_of(runs, name) for name in (torch_alone, both))
    assert len(by_torch) == 8
    assert by_both == pytest.approx(by_torch, rel=1e-5)


def losses_of(runs: Runs, name: str) -> list[float]:
    return [entry["loss"] for entry in runs.log_history(name, 8) if "loss" in entry]


def signal_in_evaluation(rank: int) -> None:
    """Receive SIGTERM while the evaluation after step 4 is under way."""
    import os

    from neox_hf.training.trainer import NeoXTrainer

    stock = NeoXTrainer.prediction_step

    def prediction_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(trainer, *args, **kwargs)

    NeoXTrainer.prediction_step = prediction_step


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_stop_does_not_wait_for_an_evaluation(runs, strategy):
    name = f"evaluating-{strategy}"
    options = ["train.eval_strategy=steps", "train.eval_steps=4", f"train.save_strategy={strategy}"]
    options += ["train.metric_for_best_model=loss", "train.per_device_eval_batch_size=1", "train.save_steps=100"]
    assert runs.run(name, *options, prepare=signal_in_evaluation) == [143], runs.message(name)
    assert [path.name for path in (runs.folder / name).glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_trainer_locks_its_directory_itself(tmp_path, tiny_trainer):
    from neox_hf.checkpoint import OutputLock
    from neox_hf.errors import CheckpointError

    with OutputLock(tmp_path), pytest.raises(CheckpointError, match="is in use by another trainer"):
        tiny_trainer(tmp_path).train()
    tiny_trainer(tmp_path).train()


def test_bf16_trains_with_the_rotary_angles_that_a_checkpoint_gives_back(tmp_path, tiny_trainer):
    import torch
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM as StockForCausalLM

    trainer = tiny_trainer(tmp_path, precision="bf16")
    trainer.train()
    stock = StockForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert stock.dtype == torch.bfloat16
    tokens = torch.arange(64)[None] % 250
    ours = trainer.model.eval()(tokens).logits
    torch.testing.assert_close(ours, stock.eval()(tokens).logits, rtol=2e-2, atol=2e-2)
    angles = trainer.model.gpt_neox.rotary_emb.inv_freq
    assert torch.equal(angles, stock.gpt_neox.rotary_emb.inv_freq)


def test_the_environment_does_not_change_the_precision(tmp_path, monkeypatch):
    from neox_hf.training.arguments import NeoXTrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for precision, mixed in (("fp32", "no"), ("bf16", "no"), ("amp", "bf16")):
        arguments = NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, precision=precision)
        assert arguments.mixed_precision == mixed


@pytest.fixture
def tiny_trainer():
    from neox_hf.data import DataSettings, SourceSettings, TokenizerSettings, TokenStream, build_tokenizer
    from neox_hf.modeling import GPTNeoXConfig, GPTNeoXForCausalLM
    from neox_hf.training.arguments import NeoXTrainingArguments
    from neox_hf.training.trainer import NeoXTrainer
    from tests.runs import write_corpus

    def build(folder, **changes):
        corpus = folder / "corpus.jsonl"
        settings = DataSettings(sources=[SourceSettings(path=str(write_corpus(corpus)))], seq_length=32, streams=4)
        tokenizer = build_tokenizer(TokenizerSettings(kind="byte"), settings, folder / "tokenizer")
        config = GPTNeoXConfig(
            vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        arguments = NeoXTrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=2,
            save_steps=2,
            peak_tflops=1.0,
            disable_tqdm=True,
            **changes,
        )
        stream = TokenStream(settings, tokenizer, split="train", vocab_size=384)
        return NeoXTrainer(GPTNeoXForCausalLM(config), arguments, train_dataset=stream, processing_class=tokenizer)

    return build
