"""Every message about a value in a recipe: its range, its section, and how it goes with the others."""

import pytest
import torch
from transformers.training_args import OptimizerNames

from neox_hf.errors import RecipeError
from neox_hf.training.recipe import load_recipe
from neox_hf.training.recipe_checks import DDP_KEYS, HF_SCHEDULE_KEYS
from neox_hf.training.recipe_limits import LIMITS
from neox_hf.training.recipe_packages import OF_ATTENTION, missing_for_optimizer
from neox_hf.training.train_section import REFUSED

BASE = """model: {num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4, rotary_pct: 0.5}
tokenizer: {kind: byte}
data: {sources: [{path: stdlib}], seq_length: 32, streams: 12}
train: {max_steps: 5, per_device_train_batch_size: 2}
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return "base.yaml"


def refusal(base, *overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe([base], overrides=overrides)
    return str(error.value)


def test_the_base_is_right(base):
    load_recipe([base])


ROWS = [(section, key, limit) for section, rows in LIMITS.items() for key, limit in rows.items()]


@pytest.mark.parametrize(("section", "key", "limit"), ROWS, ids=[f"{section}.{key}" for section, key, _ in ROWS])
def test_every_number_has_a_range(base, section, key, limit):
    low = limit.at_least - 1 if limit.at_least is not None else limit.above
    override = f"{section}.{key}={low:g}"
    assert f"override '{override}': {section}.{key} = {low:g}: must be {limit}" in refusal(base, override)
    if limit.at_most is not None or limit.below is not None:
        high = limit.at_most + 1 if limit.at_most is not None else limit.below
        override = f"{section}.{key}={high:g}"
        assert f"override '{override}': {section}.{key} = {high:g}: must be {limit}" in refusal(base, override)


def test_ranges_in_words():
    rows = LIMITS["model"]
    assert str(rows["hidden_size"]) == "at least 1"
    assert str(rows["rotary_pct"]) == "above 0 and at most 1"
    assert str(rows["hidden_dropout"]) == "at least 0 and below 1"


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_field_with_another_owner_names_it(base, key):
    override = f"train.{key}=1"
    assert refusal(base, override) == f"override '{override}': train.{key} = 1: {REFUSED[key]}"


TOO_FEW_LAYERS = "is more than model.num_hidden_layers = 2; every stage holds one layer at least"
NO_TENSOR = "shards the sequence inside a tensor group; set parallel.tensor above 1 or leave it out"
NO_ZERO = "moves the optimizer's state that ZeRO shards; set parallel.zero_stage to 1, 2 or 3"
SPLIT = (
    "shards {} over the data-parallel ranks after each backward pass; DeepSpeed's pipeline engine, which runs "
    "parallel.tensor = {} x parallel.pipeline = {}, keeps them until all micro-batches of a step are through; use 1"
)
SPLIT_GRADIENTS, SPLIT_WEIGHTS = SPLIT.format("gradients", 2, 1), SPLIT.format("weights", 1, 2)
NOT_FULL = "belongs to train.activation_checkpointing = full; set that, or remove it"
ONE_DTYPE = (
    "keeps fp32 weights and casts for each product; DeepSpeed, which runs ZeRO, tensor and pipeline parallelism, has "
    "one dtype for all; use bf16, whose fp32 master weights it shards, or fp32"
)
NOT_SHARDABLE = "keeps a state that cannot be sharded element by element; use adamw_torch_fused or adamw_torch"
NO_DDP = "does nothing: DeepSpeed, not DistributedDataParallel, reduces the gradients; remove it"
ALL_LABELS = "cannot be switched off with tensor or pipeline parallelism, which averages over all labels; remove it"
NO_WHOLE_MODEL = "watches the forward pass of a whole model, which no rank runs when the model is split; remove it"
FIXED = "is fixed by the released weights of model.pretrained = me/it; remove it"
WITH_STYLE = (
    "excludes train.lr_decay_style = cosine, whose warm-up is lr_warmup_fraction; keep one of the two schedules"
)
OF_NEOX = "belongs to GPT-NeoX's schedules; set train.lr_decay_style, or use lr_scheduler_kwargs"
NO_EPOCHS = "streams are endless and have no epochs; use steps"
WHOLE = "must be a whole number of steps, or a share of the run below 1"
SOURCE = "wants stdlib, a file, a folder, a glob, or a Hub dataset as hub:owner/name"
OF_HUB = "belongs to Hub datasets alone (path hub:owner/name); remove it"
ONE_ORIGIN = "excludes model.name = pythia-14m: weights are either released or fresh; keep one of the two"
NEEDED = "is needed when neither model.name nor model.pretrained says which model to train"
UNEVEN = "does not divide model.hidden_size = 64; every head has the same number of columns"
ROTATED = "of the 16 columns of a head; choose an even number, at least 2"
TOO_LONG = "is longer than model.max_position_embeddings = {}; shorten the samples or raise that"
A_PATH = "is needed by kind = pretrained: a folder, a tokenizer.json or a Hub id"
A_SIZE = "is needed by kind = trained: the number of tokens to learn"
SCHEDULES = "wants one of every, none, pythia or a list, each item a whole number; did you mean pythia?"
PLATEAU = "follows the evaluation loss; set train.eval_strategy"
BEST = "needs eval_strategy: steps with save_schedule: every, or save_strategy: best"

CASES = [
    # model
    ("model={name: pythia-14m, pretrained: me/it}", f'model.pretrained = "me/it": {ONE_ORIGIN}'),
    ("model=pythia-160", 'model.name = "pythia-160": is unknown; did you mean pythia-160m?'),
    ("model=llama", 'model.name = "llama": is unknown; known are gpt-neox-20b, pythia-1.4b, pythia-12b, '),
    ("model={pretrained: me/it}", f"model.hidden_size = 64: {FIXED}"),
    ("model.hidden_size=null", f"model.hidden_size = null: {NEEDED}"),
    ("model.revision=main", 'model.revision = "main": is the revision of model.pretrained, which is not set'),
    ("model.hidden_act=gellu", 'model.hidden_act = "gellu": is unknown; did you mean gelu?'),
    ("model.init_method=smal_init", 'model.init_method = "smal_init": is unknown; did you mean small_init?'),
    (
        "model.output_layer_init_method=xyz",
        'model.output_layer_init_method = "xyz": is unknown; known are normal, orthogonal, ',
    ),
    ("model.attn_implementation=spda", 'model.attn_implementation = "spda": is unknown; did you mean sdpa?'),
    ("model.kernels=tritn", 'model.kernels = "tritn": wants one of auto, triton, torch or null; did you mean triton?'),
    ("model.num_attention_heads=5", f"model.num_attention_heads = 5: {UNEVEN}"),
    ("model.rotary_pct=0.2", f"model.rotary_pct = 0.2: rotates 3 {ROTATED}"),
    ("model.rotary_pct=0.01", f"model.rotary_pct = 0.01: rotates 0 {ROTATED}"),
    ("model.max_position_embeddings=16", f"data.seq_length = 32: {TOO_LONG.format(16)}"),
    # tokenizer
    ("tokenizer={kind: pretrained}", f"tokenizer.path = null: {A_PATH}"),
    ("tokenizer={kind: trained}", f"tokenizer.vocab_size = null: {A_SIZE}"),
    ("tokenizer.path=x", 'tokenizer.path = "x": means nothing to kind = byte; remove it'),
    ("tokenizer.vocab_size=300", "tokenizer.vocab_size = 300: means nothing to kind = byte; remove it"),
    ("tokenizer={kind: char, path: x}", 'tokenizer.path = "x": means nothing to kind = char; remove it'),
    (
        "tokenizer={kind: trained, vocab_size: 256}",
        "tokenizer.vocab_size = 256: must be at least 257 for kind = trained",
    ),
    ("tokenizer={kind: char, vocab_size: 257}", "tokenizer.vocab_size = 257: must be at least 258 for kind = char"),
    ("model.vocab_size=256", "model.vocab_size = 256: is less than the 257 tokens of the tokenizer; make it larger or"),
    ("tokenizer.revision=x", 'tokenizer.revision = "x": means nothing to kind = byte; remove it'),
    (
        "tokenizer.kind=bytes",
        'tokenizer.kind = "bytes": wants one of pretrained, trained, byte, char; did you mean byte?',
    ),
    # data
    ("data.sources=[]", "data.sources = []: is empty; name at least one, for example [{path: stdlib}]"),
    ("data.sources=[{path: ''}]", f'data.sources[0].path = "": {SOURCE}'),
    ("data.sources=[{path: 'hub:a/b/c'}]", f'data.sources[0].path = "hub:a/b/c": {SOURCE}'),
    ("data.eval_sources=[{path: a}, {path: b, weight: 0}]", "data.eval_sources[1].weight = 0: must be above 0"),
    ("data.sources=[{path: a, split: test}]", f'data.sources[0].split = "test": {OF_HUB}'),
    ("data.sources=[{path: a, name: x}]", f'data.sources[0].name = "x": {OF_HUB}'),
    ("data.sources=[{path: a, revision: x}]", f'data.sources[0].revision = "x": {OF_HUB}'),
    ("data.bad_rows=skipp", 'data.bad_rows = "skipp": wants one of error, skip, quarantine; did you mean skip?'),
    # parallel
    (
        "parallel.tensor=3",
        "parallel.tensor = 3: does not divide model.num_attention_heads = 4, which its ranks share; ",
    ),
    (
        "parallel.tensor=3",
        "parallel.tensor = 3: does not divide model.intermediate_size = 256, which its ranks share; ",
    ),
    ("parallel.tensor=8", "which its ranks share; choose one of 1, 2, 4"),
    ("parallel.pipeline=4", f"parallel.pipeline = 4: {TOO_FEW_LAYERS}"),
    ("parallel.sequence=true", f"parallel.sequence = true: {NO_TENSOR}"),
    ("parallel.offload=optimizer", f'parallel.offload = "optimizer": {NO_ZERO}'),
    ("parallel.offload=optimiser", "wants one of none, optimizer; did you mean optimizer?"),
    ("parallel.partition=layers", 'parallel.partition = "layers": does nothing while parallel.pipeline = 1'),
    ("parallel={tensor: 2, zero_stage: 2}", f"parallel.zero_stage = 2: {SPLIT_GRADIENTS}"),
    ("parallel={pipeline: 2, zero_stage: 3}", f"parallel.zero_stage = 3: {SPLIT_WEIGHTS}"),
    ("parallel={pipeline: 2, partition: [0, 2]}", "parallel.partition = [0, 2]: "),
    ("parallel={pipeline: 2, partition: [0, 1, 3]}", "does not deal 2 layers to 2 stages; it wants 3 growing numbers"),
    ("train.precision=fp16", 'train.precision = "fp16": needs the loss scale of DeepSpeed; set parallel.zero_stage to'),
    (
        "train.activation_checkpointing=selctive",
        "none, full, selective or true or false or null; did you mean selective?",
    ),
    ("train.activation_checkpointing_kwargs={every_n_layers: 2}", f'{{"every_n_layers": 2}}: {NOT_FULL}'),
    # train: batch
    (
        "train.global_batch_size=3",
        "train.global_batch_size = 3: is no multiple of train.per_device_train_batch_size = 2",
    ),
    # train: schedules
    ("train.min_lr=1e-5", f"train.min_lr = 1e-05: {OF_NEOX}"),
    ("train.lr_decay_steps=3", f"train.lr_decay_steps = 3: {OF_NEOX}"),
    (
        "train.lr_scheduler_type=cosine_with_min_lr",
        'train.lr_scheduler_type = "cosine_with_min_lr": cannot be made with lr_scheduler_kwargs = {}: '
        "One of min_lr or min_lr_rate should be set",
    ),
    (
        "train.lr_scheduler_kwargs={min_lr: 0.1}",
        "cannot be made with lr_scheduler_kwargs = {'min_lr': 0.1}: get_linear_schedule_with_warmup() got an ",
    ),
    ("train.lr_scheduler_kwargs='{x'", "cannot be made with lr_scheduler_kwargs = {x: Expecting property name"),
    ("train.lr_warmup_fraction=0.1", f"train.lr_warmup_fraction = 0.1: {OF_NEOX}"),
    ("train.lr_scheduler_type=reduce_lr_on_plateau", f'train.lr_scheduler_type = "reduce_lr_on_plateau": {PLATEAU}'),
    # train: strategies
    ("train.logging_strategy=epoch", f'train.logging_strategy = "epoch": {NO_EPOCHS}'),
    ("train.eval_strategy=epoch", f'train.eval_strategy = "epoch": {NO_EPOCHS}'),
    ("train.save_strategy=epoch", f'train.save_strategy = "epoch": {NO_EPOCHS}'),
    ("train.logging_steps=1.5", f"train.logging_steps = 1.5: {WHOLE}"),
    ("train.eval_steps=2.5", f"train.eval_steps = 2.5: {WHOLE}"),
    ("train.save_steps=2.5", f"train.save_steps = 2.5: {WHOLE}"),
    ("train.warmup_steps=2.5", f"train.warmup_steps = 2.5: {WHOLE}"),
    ("train.save_schedule=[0, -1]", "train.save_schedule = [0, -1]: steps must be at least 0"),
    ("train.save_schedule=pythie", f'train.save_schedule = "pythie": {SCHEDULES}'),
    ("train.load_best_model_at_end=true", f"train.load_best_model_at_end = true: {BEST}"),
    ("train.report_to=wandbb", 'train.report_to = "wandbb": wandbb is unknown; did you mean wandb?'),
    ("train.report_to=[tensorboard, x]", 'train.report_to = ["tensorboard", "x"]: x is unknown; known are '),
    ("train.optim_args='amsgrad=true'", "has amsgrad, and optim=adamw_torch_fused takes none: its numbers are fields"),
    # hub
    ("hub.push=true", 'hub = {"push": true}: hub.push is true but hub.repo_id is missing'),
    ("hub.repo_id=name", 'hub = {"repo_id": "name"}: hub.repo_id=\'name\' is not of the form owner/name'),
    ("hub.require_push=true", "hub.require_push = true: does nothing while hub.push is false"),
]


@pytest.mark.parametrize(("override", "message"), CASES, ids=[override for override, _ in CASES])
def test_one_wrong_value(base, override, message):
    assert message in refusal(base, override)


def test_kernels_need_cuda(base, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = 'model.kernels = "triton": kernels run on CUDA, which this host has not; use auto'
    assert message in refusal(base, "model.kernels=triton")


PAIRS = [
    (["train.lr_decay_style=cosine", "train.warmup_steps=10"], f"train.warmup_steps = 10: {WITH_STYLE}"),
    (["train.lr_decay_style=cosine", "train.lr_scheduler_type=cosine"], f'lr_scheduler_type = "cosine": {WITH_STYLE}'),
    (["train.lr_decay_style=cosine", "train.lr_scheduler_kwargs={a: 1}"], f'kwargs = {{"a": 1}}: {WITH_STYLE}'),
    (
        ["train={lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 0}, learning_rate: 0}"],
        "cannot be made with lr_scheduler_kwargs = {'min_lr': 0}: ",
    ),
    (["train.lr_decay_style=linear", "train.min_lr=1"], "train.min_lr = 1: is above train.learning_rate = 5e-05"),
    (
        ["train.global_batch_size=8", "train.gradient_accumulation_steps=3"],
        "train.global_batch_size = 8: is no multiple of per_device_train_batch_size x gradient_accumulation_steps = 6; "
        "leave the accumulation out, it follows from the world",
    ),
    (
        ["train.save_schedule=none", "train.save_strategy=best"],
        'train.save_strategy = "best": excludes another train.save_schedule than every; keep one of the two',
    ),
    (
        ["train={load_best_model_at_end: true, eval_strategy: steps, eval_steps: 40, save_steps: 100}"],
        "train.load_best_model_at_end = true: needs save_steps = 100 to be a multiple of eval_steps = 40",
    ),
    (
        ["train.eval_strategy=steps", "data.eval_fraction=0"],
        "data.eval_fraction = 0: leaves nothing for train.eval_strategy; hold some documents out or name "
        "data.eval_sources",
    ),
    (
        ["model=pythia-14m", "tokenizer={kind: trained, vocab_size: 60000}"],
        "model.vocab_size = 50304: is less than the 60000 tokens of the tokenizer; "
        "make it larger or the tokenizer smaller",
    ),
    (
        ["model=pythia-14m", "data.seq_length=4096"],
        f"data.seq_length = 4096: {TOO_LONG.format(2048)}",
    ),
]


PAIRS += [
    (
        ["parallel={tensor: 4, sequence: true}", "data.seq_length=30"],
        "data.seq_length = 30: is no multiple of parallel.",
    ),
    (["model=pythia-14m", "parallel.pipeline=7"], "parallel.pipeline = 7: is more than model.num_hidden_layers = 6"),
    (["model=pythia-14m", "parallel.tensor=8"], "parallel.tensor = 8: does not divide model.num_attention_heads = 4"),
    (
        ["parallel.zero_stage=3", "train.activation_checkpointing=selective"],
        'train.activation_checkpointing = "selective": cannot tell a block\'s operations from the gathering of its '
        "weights at parallel.zero_stage = 3; use full",
    ),
    (["parallel.zero_stage=1", "train.precision=amp"], f'train.precision = "amp": {ONE_DTYPE}'),
    (["parallel.pipeline=2", "train.precision=amp"], f'train.precision = "amp": {ONE_DTYPE}'),
    (
        ["parallel.tensor=2", "train.precision=pure_bf16"],
        'train.precision = "pure_bf16": keeps no fp32 master weights; DeepSpeed, which runs ZeRO, tensor and pipeline ',
    ),
    (["parallel.zero_stage=2", "train.optim=sgd"], f'train.optim = "sgd": {NOT_SHARDABLE}'),
    (["parallel.zero_stage=2", "train.precision=bf16", "train.optim=adafactor"], f'"adafactor": {NOT_SHARDABLE}'),
    (["parallel.zero_stage=1", "train.ddp_static_graph=true"], f"train.ddp_static_graph = true: {NO_DDP}"),
    (["parallel.tensor=2", "train.average_tokens_across_devices=false"], f"across_devices = false: {ALL_LABELS}"),
    (["parallel.tensor=2", "train.debug=underflow_overflow"], f'train.debug = "underflow_overflow": {NO_WHOLE_MODEL}'),
    (
        ["train={activation_checkpointing: selective, activation_checkpointing_kwargs: {every_n_layers: 2}}"],
        f'train.activation_checkpointing_kwargs = {{"every_n_layers": 2}}: {NOT_FULL}',
    ),
]


@pytest.mark.parametrize(("overrides", "message"), PAIRS, ids=[" ".join(overrides) for overrides, _ in PAIRS])
def test_values_that_do_not_go_together(base, overrides, message):
    assert message in refusal(base, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train={load_best_model_at_end: true, eval_strategy: steps, eval_steps: 50, save_steps: 100}"],
        ["train={load_best_model_at_end: true, eval_strategy: steps, eval_steps: 50, save_strategy: best}"],
        ["train.eval_strategy=steps", "data.eval_fraction=0", "data.eval_sources=[{path: x}]"],
        ["train.lr_decay_style=cosine", "train.min_lr=1e-6", "train.lr_warmup_fraction=0.1"],
        ["train={lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}, warmup_steps: 0.1}"],
        ["train.lr_scheduler_type=polynomial", 'train.lr_scheduler_kwargs="{\\"power\\": 2}"'],
        ["train={eval_strategy: steps, lr_scheduler_type: reduce_lr_on_plateau}"],
        ["train.precision=fp32", "train.ddp_bucket_cap_mb=50", "train.ddp_static_graph=true"],
        ["train.report_to=[tensorboard, wandb]"],
        ["train.eval_strategy=no", "train.save_strategy=no"],
        ["data.sources=[{path: 'hub:me/set', split: test, name: x, revision: y}]"],
        ["model.attn_implementation=kernels-community/flash-attn"],
        ["hub.push=true", "hub.repo_id=me/it", "hub.require_push=true"],
        ["train.save_schedule=[0, 1, 7]"],
        ["tokenizer={kind: char}"],
        ["tokenizer={kind: char, vocab_size: 300}"],
        ["tokenizer={kind: pretrained, path: x, revision: main}"],
    ],
)
def test_values_that_do_go_together(base, overrides):
    load_recipe([base], overrides=overrides)


LAYOUTS = [
    "parallel={tensor: 2, pipeline: 2, sequence: true}",
    "parallel={tensor: 4, zero_stage: 1}",
    "parallel={pipeline: 2, partition: [0, 1, 2], offload: optimizer}",
    "parallel={pipeline: 2, partition: layers}",
    "parallel={zero_stage: 3, offload: optimizer}",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_layouts_that_are_right(base, layout, precision):
    load_recipe([base], overrides=[layout, f"train.precision={precision}"])


def test_fp16_needs_cuda_and_deepspeed(base, monkeypatch):
    overrides = ["parallel.zero_stage=1", "train.precision=fp16"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    load_recipe([base], overrides=overrides)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refusal(base, *overrides) == (
        "override 'train.precision=fp16': train.precision = \"fp16\": needs a CUDA device; use fp32 or bf16"
    )


def test_released_weights_need_no_sizes(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        BASE.replace(BASE.splitlines()[0], "model: {pretrained: me/it, revision: step1000, hidden_dropout: 0.1}")
    )
    assert load_recipe([str(path)]).model.pretrained == "me/it"


def test_every_mistake_is_told_at_once_with_its_place(base):
    message = refusal(base, "train.max_stepz=1", "parallel.tensor=zwei", "train.eval_strategy=often", "modl.name=x")
    assert message.splitlines() == [
        "4 problems:",
        '  override \'modl.name=x\': modl = {"name": "x"}: unknown key; did you mean model?',
        "  override 'parallel.tensor=zwei': parallel.tensor = \"zwei\": wants a whole number",
        "  override 'train.eval_strategy=often': train.eval_strategy = \"often\": wants one of no, steps, epoch",
        "  override 'train.max_stepz=1': train.max_stepz = 1: unknown key; did you mean train.max_steps?",
    ]


def test_a_value_from_a_file_has_its_line(tmp_path, monkeypatch, base):
    (tmp_path / "bad.yaml").write_text("train:\n  max_steps: 10\n  learning_rate: -1\n")
    with pytest.raises(RecipeError) as error:
        load_recipe([base, "bad.yaml"])
    assert str(error.value) == "bad.yaml:3: train.learning_rate = -1: must be at least 0"


def test_a_default_that_does_not_fit_says_that_it_is_one(base):
    assert refusal(base, "train.lr_decay_style=linear", "train.min_lr=0.1").startswith("override 'train.min_lr=0.1': ")
    assert refusal(base, "tokenizer.kind=trained") == (
        "override 'tokenizer.kind=trained' (default value): tokenizer.vocab_size = null: "
        "is needed by kind = trained: the number of tokens to learn"
    )


def test_master_weights_need_adamw(base):
    assert refusal(base, "train.precision=bf16", "train.optim=adafactor") == (
        "override 'train.optim=adafactor': train.optim = \"adafactor\": keeps no fp32 master weights, which "
        "train.precision = bf16 needs; use adamw_torch_fused or adamw_torch, or train.precision = amp"
    )


@pytest.mark.parametrize("key", DDP_KEYS)
def test_master_weights_do_without_ddp(base, key):
    value = "50" if key == "ddp_bucket_cap_mb" else "true"
    assert refusal(base, "train.precision=bf16", f"train.{key}={value}") == (
        f"override 'train.{key}={value}': train.{key} = {value}: does nothing: train.precision = bf16 reduces "
        "gradients in fp32 by itself; remove it"
    )


def test_auto_precision_is_the_host_s(base, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    load_recipe([base], overrides=["train.ddp_bucket_cap_mb=50"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "train.precision = bf16 reduces" in refusal(base, "train.ddp_bucket_cap_mb=50")


@pytest.fixture
def installed(monkeypatch):
    """The modules that can be found; none to begin with."""
    modules = set()
    monkeypatch.setattr("neox_hf.training.recipe_packages.find_spec", lambda name: name if name in modules else None)
    return modules


def test_an_optimizer_of_a_package_that_is_not_installed(base, installed):
    overrides = ["train.precision=fp32", "train.optim=galore_adamw"]
    assert refusal(base, *overrides) == (
        "override 'train.optim=galore_adamw': train.optim = \"galore_adamw\": needs the package galore-torch, which is "
        "not installed; install it, or choose another optimizer"
    )
    installed.add("galore_torch")
    load_recipe([base], overrides=overrides)


def test_optimizers_that_need_no_further_package(installed):
    bare = {name.value for name in OptimizerNames if missing_for_optimizer(name.value) is None}
    assert bare == {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


@pytest.mark.parametrize("name", OF_ATTENTION)
def test_flash_attention_that_is_not_installed(base, installed, name):
    module, package = OF_ATTENTION[name]
    override = f"model.attn_implementation={name}"
    assert refusal(base, override) == (
        f"override '{override}': model.attn_implementation = \"{name}\": needs the package {package}, which is not "
        "installed; install it, or use sdpa"
    )
    for found in (module, "kernels"):
        installed.clear()
        installed.add(found)
        load_recipe([base], overrides=[override])


def test_a_key_of_another_section_is_found(base):
    assert refusal(base, "train.seq_length=5").endswith("unknown key; did you mean data.seq_length?")


def test_schedule_keys_exist():
    assert set(HF_SCHEDULE_KEYS).isdisjoint(REFUSED)
