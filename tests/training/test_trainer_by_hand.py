"""`NeoXTrainer` in the hands of somebody who knows HF's Trainer: its arguments, and several in one process."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.modeling.small import SMALL
from tests.training.test_evaluation import corpus, make_trainer  # noqa: F401 (corpus is a fixture)


class Words(Dataset):
    """Samples of twelve words, of which the last four are padding."""

    def __init__(self, embeds: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, SMALL["vocab_size"], (16, 12), generator=draw)
        self.embeds = torch.randn(16, 12, SMALL["hidden_size"], generator=draw) if embeds else None

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        kept = torch.arange(12) < 8
        inputs = {"input_ids": self.ids[place]} if self.embeds is None else {"inputs_embeds": self.embeds[place]}
        return {**inputs, "labels": self.ids[place].where(kept, -100), "attention_mask": kept.long()}


def small_model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


@pytest.fixture
def make(tmp_path):
    """A trainer, given fields of its arguments and, as `trainer`, what HF's Trainer takes beside them."""
    count = iter(range(9))

    def make(model=None, dataset=None, trainer=None, **given):
        values = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
        values |= {"precision": "fp32", "peak_tflops": 1.0, "disable_tqdm": True, "save_strategy": "no", **given}
        arguments = NeoXTrainingArguments(output_dir=str(tmp_path / str(next(count))), use_cpu=True, **values)
        others = trainer or {}
        if "model_init" not in others:
            model = small_model() if model is None else model
        return NeoXTrainer(model, arguments, train_dataset=dataset or Words(), **others)

    return make


def losses(trainer: NeoXTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"z_loss": 0.1}, {}),
        ({"precision": "fp8"}, {"precision": "pure_bf16"}),
        ({"precision": "bf16"}, {"precision": "pure_bf16"}),
        ({"precision": "bf16"}, {}),
        ({"activation_checkpointing": "selective"}, {}),
    ],
)
def test_a_trainer_leaves_nothing_on_the_model_for_the_next(first, then, make):
    fresh = make(**then)
    wanted = losses(fresh)
    used = small_model()
    make(used, max_steps=1, learning_rate=0.0, **first).train()
    used.float().load_state_dict(small_model().state_dict())
    again = make(used, **then)
    assert losses(again) == wanted
    assert [p.grad_dtype for p in used.parameters()] == [p.grad_dtype for p in fresh.model.parameters()]
    for ours, theirs in zip(used.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_may_be_made_by_a_function(make):
    wanted = losses(make(seed=0, z_loss=0.1))
    trainer = make(seed=0, z_loss=0.1, trainer={"model_init": small_model})
    assert losses(trainer) == wanted
    assert losses(make(precision="bf16", trainer={"model_init": small_model}))
    assert {p.dtype for p in make(precision="bf16", trainer={"model_init": small_model}).model.parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(
    ("given", "trainer", "message"),
    [
        ({"z_loss": 0.1}, {"compute_loss_func": lambda *_, **__: None}, "which compute_loss_func replaces; drop one"),
        ({"z_loss": 0.1, "label_smoothing_factor": 0.1}, {}, "which label_smoothing_factor replaces; drop one"),
        ({"precision": "fp8"}, {"model_init": small_model}, "scales for one model; give model= in place"),
    ],
)
def test_what_does_not_go_together_is_refused(given, trainer, message, make):
    with pytest.raises(ValueError, match=message):
        make(trainer=trainer, **given)


@pytest.mark.parametrize("given", [{"label_smoothing_factor": 0.1}, {"auto_find_batch_size": True}])
def test_what_a_stream_cannot_have_is_refused(given, tmp_path, corpus):  # noqa: F811
    with pytest.raises(ValueError, match=f"{next(iter(given))}.* with a TokenStream"):
        make_trainer(tmp_path, corpus, **given)


def test_a_rate_of_zero_changes_nothing(make):
    trainer = make(learning_rate=0, lr_decay_style="cosine", min_lr=0.0)
    trainer.train()
    for ours, theirs in zip(trainer.model.parameters(), small_model().parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("counted", "tokens"), [("no", 2 * 24), ("all", 2 * 24), ("non_padding", 2 * 16)])
def test_tokens_that_were_seen(counted, tokens, make):
    trainer = make(include_num_input_tokens_seen=counted)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == tokens


def test_samples_may_be_embeddings(make):
    trainer = make(dataset=Words(embeds=True))
    assert len(losses(trainer)) == 2
    assert trainer.state.num_input_tokens_seen == 2 * 24


def test_batches_of_evaluation_by_name_and_for_predictions(tmp_path, corpus):  # noqa: F811
    trainer = make_trainer(tmp_path, corpus, max_steps=1, save_strategy="no")
    batches = trainer.eval_dataset
    one = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = {"a": batches, "b": batches}
    both = trainer.evaluate()
    assert both["eval_a_loss"] == both["eval_b_loss"] == one
    assert trainer.predict(batches).metrics["test_loss"] == one


def test_a_loss_that_is_no_number_has_no_perplexity(tmp_path, corpus):  # noqa: F811
    trainer = make_trainer(tmp_path, corpus)
    next(trainer.model.parameters()).data.fill_(math.nan)
    assert math.isnan(trainer.evaluate()["eval_perplexity"])


def test_saving_the_model_pushes_it_as_hf_s_does(make, monkeypatch, caplog):
    monkeypatch.setattr(NeoXTrainer, "init_hf_repo", lambda trainer: None)
    pushed = []
    monkeypatch.setattr(NeoXTrainer, "push_to_hub", lambda trainer, **given: pushed.append(given["commit_message"]))
    trainer = make(push_to_hub=True, hub_model_id="someone/small")
    assert "push_to_hub: save_model pushes, and checkpoints stay here; publisher=" in caplog.text
    trainer.save_model()
    assert pushed == ["Model save"]
    trainer.save_model(_internal_call=True)
    assert pushed == ["Model save"]


@pytest.mark.parametrize("begins_anew", [False, True])
def test_data_may_begin_anew_where_a_run_goes_on(begins_anew, make):
    seen = []

    def collate(rows):
        seen.append(rows[0]["input_ids"].tolist())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    given = {"save_strategy": "steps", "save_steps": 1, "trainer": {"data_collator": collate}}
    first = make(max_steps=1, **given)
    first.train()
    begun = seen.pop(0)
    seen.clear()
    make(max_steps=2, ignore_data_skip=begins_anew, **given).train(first.args.output_dir + "/checkpoint-1")
    assert (seen[0] == begun) == begins_anew


def test_adapters_in_a_model_that_is_split_are_refused(make):
    adapted = get_peft_model(small_model(), LoraConfig(r=2, target_modules=["query_key_value"]))
    with pytest.raises(
        ValueError, match="PEFT's adapters does not go with tensor=2, pipeline=1: its layers know of no"
    ):
        make(adapted, trainer={"topology": Topology(tensor=2, rank=0)})
