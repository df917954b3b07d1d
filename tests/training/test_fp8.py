"""`train.precision: fp8`: the curve of bf16, scales that a checkpoint carries, and that each resumes the other."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig as StockConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from neox_hf.data import DataSettings, SourceSettings, TokenizerSettings, TokenStream, build_tokenizer
from neox_hf.errors import RecipeError
from neox_hf.modeling import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.faults.test_interruptions import signal_self
from tests.runs import Runs, write_corpus

FP8, BF16 = "train.precision=fp8", "train.precision=bf16"
NO_SCALES = "holds no fp8 scales: the next step finds them from its own values"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("fp8"))
    assert runs.run("whole", FP8) == [0], runs.message("whole")
    return runs


def stop_after_four(runs: Runs, name: str, *options: str) -> None:
    stop = {"prepare": signal_self, "number": signal.SIGTERM, "at_step": 3, "on_rank": 0}
    assert runs.run(name, *options, **stop) == [143], runs.message(name)


def test_resumed_is_uninterrupted(runs):
    stop_after_four(runs, "resumed", FP8)
    assert runs.run("resumed", FP8) == [0], runs.message("resumed")
    assert NO_SCALES not in runs.message("resumed")
    whole, resumed = runs.weights("whole", 8), runs.weights("resumed", 8)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_what_is_saved_is_that_of_bf16_and_the_scales(runs):
    assert runs.run("half", BF16) == [0], runs.message("half")
    folders = [runs.folder / name / "checkpoint-8" for name in ("whole", "half")]
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    assert files[0] - files[1] == {"state/fp8-0-of-1.safetensors"}
    assert files[1] - files[0] == set()
    assert {tensor.dtype for tensor in runs.weights("whole", 8).values()} == {torch.bfloat16}
    assert json.loads((folders[0] / "config.json").read_text()) == json.loads((folders[1] / "config.json").read_text())
    scales = load_file(folders[0] / "state/fp8-0-of-1.safetensors")
    assert len(scales) == 2 * 4 * 3
    assert {tuple(history.shape) for history in scales.values()} == {(16,)}
    assert all((history[:8] > 0).all() for name, history in scales.items() if not name.endswith("gradient"))


@pytest.mark.parametrize(("before", "after"), [(BF16, FP8), (FP8, BF16)])
def test_each_goes_on_from_the_others_checkpoints(runs, before, after):
    name = f"from-{before[-4:]}"
    stop_after_four(runs, name, before)
    assert runs.run(name, after) == [0], runs.message(name)
    assert runs.losses(name) == pytest.approx(runs.losses("whole"), rel=5e-3)
    assert (NO_SCALES in runs.message(name)) == (after == FP8)


def test_two_ranks_follow_one_and_agree_on_scales(runs):
    alike = [FP8, "model.hidden_dropout=0"]
    options = [*alike, "train.per_device_train_batch_size=1"]
    assert runs.run("pair", *options, world_size=2) == [0, 0], runs.message("pair", 1)
    assert runs.run("single", *alike) == [0], runs.message("single")
    assert runs.losses("pair") == pytest.approx(runs.losses("single"), rel=5e-3)
    saved = [runs.folder / name / "checkpoint-8" / "state" for name in ("pair", "single")]
    assert [path.name for path in saved[0].glob("fp8-*")] == ["fp8-0-of-2.safetensors"]
    pair, single = (load_file(next(folder.glob("fp8-*"))) for folder in saved)
    first = "gpt_neox.layers.0.attention.query_key_value.input"
    # Its first step has the same weights: the largest of both ranks' tokens is the largest of all.
    assert pair[first][7] == single[first][7]
    assert runs.run("pair", *options, "train.max_steps=10", world_size=2) == [0, 0], runs.message("pair", 1)


def small_trainer(folder, precision: str, **changes) -> NeoXTrainer:
    folder.mkdir()
    corpus = write_corpus(folder / "corpus.jsonl", documents=400)
    settings = DataSettings(sources=[SourceSettings(path=str(corpus))], seq_length=64, streams=4)
    tokenizer = build_tokenizer(TokenizerSettings(kind="byte"), settings, folder / "tokenizer")
    config = GPTNeoXConfig(
        vocab_size=272, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    arguments = NeoXTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        precision=precision,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.1,
        logging_steps=1,
        peak_tflops=1.0,
        disable_tqdm=True,
        **changes,
    )
    torch.manual_seed(0)
    stream = TokenStream(settings, tokenizer, split="train", vocab_size=config.vocab_size)
    return NeoXTrainer(GPTNeoXForCausalLM(config), arguments, train_dataset=stream, processing_class=tokenizer)


def curve(trainer: NeoXTrainer) -> torch.Tensor:
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_the_curve_is_that_of_bf16(tmp_path):
    options = {"max_steps": 60, "save_schedule": "none"}
    half, eight = (curve(small_trainer(tmp_path / name, name, **options)) for name in ("bf16", "fp8"))
    assert half[-1] < 0.4 * half[0]
    assert not torch.equal(half, eight)
    assert ((eight - half).abs() / half).max() < 5e-3


def test_other_weights_are_scaled_by_their_own_values(tmp_path):
    trainer = small_trainer(tmp_path / "run", "fp8", max_steps=2, save_steps=2)
    trainer.train()
    assert trainer.fp8.scales.capturable
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert not trainer.fp8.scales.capturable
    assert not any(slot.knows() for slot in trainer.fp8.scales.slots.values())


def test_a_model_of_another_class_is_refused(tmp_path):
    config = StockConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    arguments = NeoXTrainingArguments(output_dir=str(tmp_path), use_cpu=True, precision="fp8")
    with pytest.raises(RecipeError, match="without linears of neox_hf's block; use bf16"):
        NeoXTrainer(stock.GPTNeoXForCausalLM(config), arguments)
