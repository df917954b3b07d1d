"""What PEFT has put on a model is saved as its adapters and loads as such; a run resumes from all of the weights."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from neox_hf.checkpoint import CheckpointWriter, open_checkpoint, write_final
from neox_hf.checkpoint.adapters import ADAPTER, ADAPTER_CONFIG, has_adapters
from neox_hf.checkpoint.host_memory import HostMemory
from neox_hf.parallel.topology import Topology
from neox_hf.training.arguments import NeoXTrainingArguments
from neox_hf.training.trainer import NeoXTrainer
from tests.checkpoint.conftest import MODEL_CLASSES, SIZES, build, small_tokenizer
from tests.runs import Runs

IDS = torch.randint(SIZES["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(7))
LOADERS = {**MODEL_CLASSES, "ours": transformers.AutoModelForCausalLM}
LORA = {"r": 2, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}


@pytest.fixture
def base(tmp_path):
    """A folder with a base model."""
    build("stock", seed=1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def as_adapter(base, folder, kind: str = "ours") -> torch.Tensor:
    """Logits of the base model with the adapter in `folder`."""
    return logits(peft.PeftModel.from_pretrained(LOADERS[kind].from_pretrained(base), folder))


def as_model(folder, kind: str = "ours") -> torch.Tensor:
    return logits(LOADERS[kind].from_pretrained(folder))


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def vary(model, seed: int = 3):
    """Random values for what is trained: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def adapted(base, kind: str = "ours", config: peft.PeftConfig | None = None):
    model = MODEL_CLASSES[kind].from_pretrained(base)
    return peft.get_peft_model(model, config or peft.LoraConfig(**LORA))


def train(base, output_dir, kind: str, seed: int, resume: bool = False):
    torch.manual_seed(seed)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(240).reshape(16, 15) % 61]
    arguments = NeoXTrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = adapted(base, kind)
    trainer = NeoXTrainer(
        model,
        arguments,
        train_dataset=rows,
        processing_class=small_tokenizer(),
        data_collator=transformers.default_data_collator,
    )
    trainer.train("latest" if resume else None)
    return trainer


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_a_run_saves_adapters_and_resumes_bit_for_bit(base, tmp_path, kind):
    trainer = train(base, tmp_path / "whole", kind, seed=0)
    trainer.save_model()
    final, last = tmp_path / "whole", tmp_path / "whole" / "checkpoint-4"
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert names_in(final) == [ADAPTER_CONFIG, ADAPTER, *tokenizer]
    assert names_in(last) == [ADAPTER_CONFIG, ADAPTER, "manifest.json", *tokenizer, "trainer_state.json"]
    wanted = logits(trainer.model)
    assert not torch.equal(wanted, as_model(base, kind))
    for folder in (final, last):
        assert torch.equal(as_adapter(base, folder, kind), wanted)
        assert torch.equal(as_model(folder, kind), wanted)

    shutil.copytree(final / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(base, tmp_path / "again", kind, seed=1, resume=True)  # the adapter it begins with is another one
    assert_same_files(last, tmp_path / "again" / "checkpoint-4")


def assert_same_files(one, other):
    tensors = [sorted(path.relative_to(of) for path in of.rglob("*.safetensors")) for of in (one, other)]
    assert tensors[0] == tensors[1]
    assert len(tensors[0]) == 5  # the adapter, all weights, two moments, random states
    for name in tensors[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def save(model, output_dir, memory: HostMemory | None = None, **settings) -> Path:
    writer = CheckpointWriter(output_dir, 1, memory=memory)
    writer.write_weights(model, **settings)
    return writer.commit()


def config_in(folder):
    """PEFT writes a set of modules as a list, in whatever order the set is."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    modules = config.get("target_modules")
    return config | ({"target_modules": sorted(modules)} if isinstance(modules, list) else {})


KINDS = {
    "everything linear": peft.LoraConfig(
        **LORA, target_modules="all-linear", modules_to_save=["final_layer_norm"], bias="all"
    ),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "embeddings": peft.LoraConfig(**LORA, target_modules=["embed_in", "query_key_value"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices={"embed_in": [1, 5]}),
    "no task": peft.LoraConfig(r=2),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(base, tmp_path, kind):
    """As `save_pretrained` of PEFT has it."""
    model = vary(adapted(base, config=KINDS[kind]))
    write_final(model, None, tmp_path / "final")
    at_once, deferred = (save(model, tmp_path / name, memory) for name, memory in (("a", None), ("b", HostMemory())))
    assert not model.active_peft_config.inference_mode
    model.save_pretrained(tmp_path / "stock")
    theirs = load_file(tmp_path / "stock" / ADAPTER)
    for saved in (tmp_path / "final", at_once, deferred):
        ours = load_file(saved / ADAPTER)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert config_in(saved) == config_in(tmp_path / "stock")
        assert torch.equal(as_adapter(base, saved), logits(model))


def test_several_adapters(base, tmp_path):
    model = adapted(base)
    model.add_adapter("other", peft.LoraConfig(**LORA | {"r": 3}))
    for name in ("default", "other"):
        model.set_adapter(name)
        vary(model)
    folders = {"default": "", "other": "other"}
    for saved in (save(model, tmp_path / "run"), write_final(model, None, tmp_path / "final")):
        for name, folder in folders.items():
            model.set_adapter(name)
            assert torch.equal(as_adapter(base, saved / folder), logits(model))


@pytest.mark.parametrize("name", [None, "mine"])
def test_adapters_by_transformers_itself(base, tmp_path, name):
    """Where PEFT wraps nothing: `add_adapter` of transformers' models."""
    model = MODEL_CLASSES["ours"].from_pretrained(base)
    model.add_adapter(peft.LoraConfig(**LORA), name)
    vary(model)
    for saved in (save(model, tmp_path / "run"), write_final(model, None, tmp_path / "final")):
        assert torch.equal(as_adapter(base, saved), logits(model))
        assert torch.equal(as_model(saved), logits(model))


def test_a_checkpoint_of_before_is_read(base, tmp_path, monkeypatch):
    """Then all weights lay where now the adapter is."""
    model, other = vary(adapted(base)), adapted(base)
    with monkeypatch.context() as patch:
        patch.setattr("neox_hf.checkpoint.writer.has_adapters", lambda *_: False)
        checkpoint = open_checkpoint(save(model, tmp_path / "run"))
    assert checkpoint.has("model.safetensors")
    checkpoint.load_weights(other)
    assert torch.equal(logits(other), logits(model))


def test_shards_of_all_weights_are_read(base, tmp_path):
    model, other = vary(adapted(base)), adapted(base)
    checkpoint = open_checkpoint(save(model, tmp_path / "run", shard_bytes=5_000))
    assert len(list((checkpoint.path / "state").glob("model-*.safetensors"))) > 2
    checkpoint.load_weights(other)
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(as_adapter(base, checkpoint.path), logits(model))


def test_a_split_model_is_saved_as_any_other(base):
    model = adapted(base)
    assert has_adapters(model, Topology(data=2))
    assert not has_adapters(model, Topology(tensor=2))
    assert not has_adapters(model.get_base_model(), Topology.single())


# One model in the place of another


def test_the_base_model_may_lie_in_the_folder(base):
    model = vary(adapted(base))
    before = names_in(base)
    write_final(model, None, base)
    assert names_in(base) == sorted([*before, ADAPTER, ADAPTER_CONFIG])
    assert torch.equal(as_model(base), logits(model))


def test_a_base_model_without_a_name_is_left_alone(tmp_path):
    model = build("ours", seed=1)
    model.save_pretrained(tmp_path)
    write_final(vary(peft.get_peft_model(model, peft.LoraConfig(**LORA))), None, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert torch.equal(as_model(tmp_path), logits(model))


def of_alpha(base, alpha: int):
    config = peft.LoraConfig(**LORA, lora_alpha=alpha)
    return vary(adapted(base, config=config), seed=alpha)


MAKERS = {
    "a model": lambda base: build("ours", seed=2),
    "an adapter": lambda base: of_alpha(base, 4),
    "one like it": lambda base: vary(of_alpha(base, 4), seed=5),
    "another": lambda base: of_alpha(base, 64),
}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a model", "an adapter"),
        ("an adapter", "a model"),
        ("an adapter", "one like it"),
        ("an adapter", "another"),
    ],
)
def test_stopped_anywhere_it_is_no_mixture(base, tmp_path, monkeypatch, old, new):
    models = {name: MAKERS[name](base) for name in (old, new)}
    wanted = {name: logits(model) for name, model in models.items()}
    seen = []
    for stop_before in range(20):
        output_dir = tmp_path / f"run-{stop_before}"
        write_final(models[old], None, output_dir)
        with monkeypatch.context() as patch:
            finished = stopped_after(
                stop_before, patch, lambda folder=output_dir: write_final(models[new], None, folder)
            )
        seen.append(outcome(output_dir, wanted))
        if finished:
            break
    assert finished
    assert seen[-1] == new
    assert set(seen) <= {old, new, "none"}
    assert "none" not in seen or (old, new) != ("an adapter", "one like it")
    theirs = {ADAPTER, ADAPTER_CONFIG}
    assert set(names_in(output_dir)) == theirs if new != "a model" else not theirs & set(names_in(output_dir))


def stopped_after(changes: int, patch: pytest.MonkeyPatch, write) -> bool:
    """Whether `write` came to its end before it had made so many changes to names in its folder, and one more."""
    left = changes

    def counted(call):
        def change(*args, **options):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return call(*args, **options)

        return change

    patch.setattr("os.replace", counted(os.replace))
    patch.setattr("pathlib.Path.unlink", counted(Path.unlink))
    try:
        write()
    except KeyboardInterrupt:
        return False
    return True


def outcome(output_dir, wanted: dict[str, torch.Tensor]) -> str:
    try:
        found = as_model(output_dir)
    except (OSError, ValueError, RuntimeError):
        return "none"
    return next((name for name, of in wanted.items() if torch.equal(of, found)), "a mixture")


# Several ranks


def adapt(rank: int) -> None:
    """Have the run train an adapter with a module of its own to save."""
    init = NeoXTrainer.__init__

    def with_adapter(trainer, model, *args, **options):
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["final_layer_norm"])
        init(trainer, peft.get_peft_model(model, config), *args, **options)

    NeoXTrainer.__init__ = with_adapter


@pytest.mark.parametrize("zero", [0, 3])
def test_ranks_write_one_adapter(tmp_path, zero):
    runs = Runs(tmp_path)
    settings = (f"parallel.zero_stage={zero}", "train.max_steps=2")
    assert runs.run("run", *settings, world_size=2, prepare=adapt) == [0, 0], runs.message("run")
    folder = runs.folder / "run" / "checkpoint-2"
    whole = load_file(folder / "state" / "model.safetensors")
    for saved in (folder, folder.parent):
        adapter = load_file(saved / ADAPTER)
        assert len(adapter) == 6
        for name, tensor in adapter.items():
            in_memory = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
            in_memory = in_memory.replace("final_layer_norm.", "final_layer_norm.modules_to_save.default.")
            assert torch.equal(tensor, whole[in_memory]), name
    assert runs.run("run", *settings, "train.max_steps=4", world_size=2, prepare=adapt) == [0, 0], runs.message("run")
