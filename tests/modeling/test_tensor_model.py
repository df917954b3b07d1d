"""A model split over a tensor group is the model of one process: values, gradients, messages, generation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neox_hf import GPTNeoXForCausalLM
from neox_hf.parallel import Topology
from neox_hf.parallel.data_parallel import accumulate_gradients_in_fp32
from tests.gloo import run_ranks
from tests.modeling.tensor_ranks import Layout, Pass, batch, joined, train_pass

# Each pair of options once. 256 is what two ranks would pad to anyway; 129 is barely over what one rank holds.
MODELS = [
    {"vocab_size": 150, "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False},
    {"vocab_size": 256, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": False},
    {"vocab_size": 300, "use_parallel_residual": True, "attention_bias": False, "tie_word_embeddings": True},
    {"vocab_size": 129, "use_parallel_residual": False, "attention_bias": True, "tie_word_embeddings": True},
]
LAYOUTS = [(2, False), (4, False), (2, True)]


def layouts(tensor: int, sequence: bool) -> list[Layout]:
    return [Layout(tensor, sequence, fields) for fields in MODELS]


def inputs_of(number: int) -> dict[str, torch.Tensor]:
    """For the model of that number; every other one gets packed documents."""
    return batch(packed=number % 2 == 0, vocabulary=MODELS[number]["vocab_size"])


def step_and_logits(rank: int, tensor: int, sequence: bool) -> list[tuple[Pass, torch.Tensor, torch.Tensor]]:
    seen = []
    for number, layout in enumerate(layouts(tensor, sequence)):
        model = layout.of_rank(rank)
        inputs = inputs_of(number)
        seen.append((train_pass(model, inputs), *logits_and_their_gradient(model, inputs)))
    return seen


def logits_and_their_gradient(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of one replicated parameter through them: a loss of the user's own wants logits."""
    model.zero_grad()
    model.loss_function = lambda logits, **_: logits.float().pow(2).mean()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), model.gpt_neox.layers[0].input_layernorm.weight.grad


@pytest.mark.parametrize(("tensor", "sequence"), LAYOUTS)
def test_equals_one_process(tensor, sequence):
    ranks = run_ranks(step_and_logits, tensor, tensor, sequence)
    for number, layout in enumerate(layouts(tensor, sequence)):
        whole, inputs = layout.whole(), inputs_of(number)
        wanted = train_pass(whole, inputs)
        logits, gradient = logits_and_their_gradient(whole, inputs)
        passes = [rank[number][0] for rank in ranks]
        for one in passes:
            torch.testing.assert_close(one.loss, wanted.loss, rtol=1e-5, atol=0)
        for name, value in wanted.gradients.items():
            assert_near(joined(passes, name), value, name)
        for layer, value in enumerate(wanted.residuals):
            assert_same_residual([one.residuals[layer] for one in passes], value, sequence)
        for rank in ranks:
            assert_near(rank[number][1], logits, "logits")
            assert_near(rank[number][2], gradient, "gradient through the logits")


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Within 1e-5 of the largest element."""
    scale = wanted.abs().max()
    assert scale > 0, f"{name} is zero: nothing to compare"
    worst = (found - wanted).abs().max() / scale
    assert worst <= 1e-5, f"{name} is {worst:.1e} of its largest element away"


def assert_same_residual(ranks: list[torch.Tensor], wanted: torch.Tensor, sequence: bool) -> None:
    """Equal on all ranks where it is replicated; and near the whole one without leaning to one side of it."""
    if sequence:
        ranks = [torch.cat(ranks, dim=1)]
    for found in ranks:
        assert torch.equal(found, ranks[0])
        assert_near(found, wanted, "residual")
        drift = (found.double() - wanted.double()).mean() / wanted.double().std()
        assert abs(drift) < 1e-7


class Messages(TorchDispatchMode):
    """Counts what a process sends: collectives by name, large ones and small ones apart."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            size = "large" if max(tensor.numel() for tensor in tensors) >= self.large else "small"
            name = f"{size} {func._schema.name.removeprefix('c10d::')}"
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def count_messages(rank: int) -> list[list[dict[str, int]]]:
    """Of one layer, forward and backward; for each of three layouts."""
    return [
        messages_of_a_layer(rank, sequence, parallel)
        for sequence, parallel in ((False, True), (False, False), (True, True))
    ]


def messages_of_a_layer(rank: int, sequence: bool, parallel: bool) -> list[dict[str, int]]:
    layer = Layout(2, sequence, {"use_parallel_residual": parallel}).of_rank(rank).train().gpt_neox.layers[0]
    hidden = torch.randn(2, 8 if sequence else 16, 32, requires_grad=True)
    angles = torch.zeros(1, 16, 1), torch.zeros(1, 16, 1)
    with Messages(large=hidden.numel()) as forward:
        output = layer(hidden, position_embeddings=angles)
    with Messages(large=hidden.numel()) as backward:
        output.sum().backward()
    return [forward.counts, backward.counts]


def test_messages_of_a_layer():
    first, second = run_ranks(count_messages, 2)
    assert first == second
    parallel, sequential, scattered = first
    assert parallel == [{"large allreduce_": 1}, {"large allreduce_": 1, "small allreduce_": 1}]
    assert sequential == [{"large allreduce_": 2}, {"large allreduce_": 2, "small allreduce_": 2}]
    gather, scatter = "large _allgather_base_", "large _reduce_scatter_base_"
    assert scattered == [{gather: 2, scatter: 1}, {gather: 3, scatter: 2, "small allreduce_": 1}]


BOTH = (False, True)
"""Without and with sequence parallelism."""


def bfloat16_passes(rank: int) -> list[Pass]:
    return [bfloat16_pass(Layout(2, sequence, dtype=torch.bfloat16).of_rank(rank)) for sequence in BOTH]


def bfloat16_pass(model: GPTNeoXForCausalLM) -> Pass:
    accumulate_gradients_in_fp32(model)
    return train_pass(model, batch(rows=4, length=32))


def test_bfloat16_is_as_near_to_the_truth():
    truth = train_pass(Layout(1).whole(), batch(rows=4, length=32))
    single = bfloat16_pass(Layout(1, dtype=torch.bfloat16).whole())
    for passes in zip(*run_ranks(bfloat16_passes, 2), strict=True):
        assert abs(passes[0].loss - truth.loss) <= abs(single.loss - truth.loss) + 1e-3
        split = {name: joined(passes, name) for name in truth.gradients}
        assert {gradient.dtype for gradient in split.values()} == {torch.float32}
        assert mean_error(split, truth.gradients) <= 1.1 * mean_error(single.gradients, truth.gradients)


def mean_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Over all parameters, each relative to the norm of its gradient."""
    return sum(relative_error(found[name], value) for name, value in wanted.items()) / len(wanted)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def autocast_passes(rank: int) -> list[Pass]:
    with torch.autocast("cpu", torch.bfloat16):
        return [train_pass(Layout(2, sequence).of_rank(rank), batch()) for sequence in BOTH]


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        wanted = train_pass(Layout(1).whole(), batch())
    for passes in zip(*run_ranks(autocast_passes, 2), strict=True):
        assert abs(passes[0].loss - wanted.loss) < 1e-2
        for name, gradient in wanted.gradients.items():
            found = joined(passes, name)
            assert found.dtype == torch.float32
            assert relative_error(found, gradient) < 0.1, name


def test_padding_starts_at_zero():
    config = Layout(2, fields={"vocab_size": 200}).whole().config
    model = GPTNeoXForCausalLM(config, Topology.from_world(2, 1, tensor=2))
    for weight in (model.lm_head.weight, model.gpt_neox.embed_in.weight):
        assert weight.shape == (128, 32)
        assert weight[:72].abs().sum(1).min() > 0
        assert not weight[72:].any()


def frozen_pass(rank: int) -> list[dict[str, torch.Tensor]]:
    """Gradients where embedding and column linears are frozen, and where all but one column linear is."""
    gradients = []
    for keep in (("norm", "dense"), ("layers.0.attention.query_key_value",)):
        model = Layout(2).of_rank(rank)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in keep) and "h_to_4h" not in name)
        model.train()(**batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return gradients


def test_frozen_parameters():
    wanted = train_pass(Layout(1).whole(), batch()).gradients
    norms, one = run_ranks(frozen_pass, 2)[0]
    assert {name.split(".")[-2] for name in norms} == {
        "input_layernorm", "post_attention_layernorm", "final_layer_norm", "dense", "dense_4h_to_h"
    }  # fmt: skip
    assert_near(
        norms["gpt_neox.layers.0.input_layernorm.weight"], wanted["gpt_neox.layers.0.input_layernorm.weight"], ""
    )
    assert {name.rsplit(".", 1)[0] for name in one} == {"gpt_neox.layers.0.attention.query_key_value"}
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert_near(one[name], wanted[name][: one[name].shape[0]], name)


def generate(rank: int) -> list[list[torch.Tensor]]:
    return [greedy_and_sampled(Layout(2, sequence).of_rank(rank).eval()) for sequence in BOTH]


def greedy_and_sampled(model) -> list[torch.Tensor]:
    prompt = batch(length=7)["input_ids"]
    torch.manual_seed(3)
    options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(prompt, do_sample=sampled, **options) for sampled in (False, True)]


def test_generates_the_same_tokens():
    wanted = greedy_and_sampled(Layout(1).whole().eval())
    for layouts_of_rank in run_ranks(generate, 2):
        for generated in layouts_of_rank:
            for found, tokens in zip(generated, wanted, strict=True):
                assert torch.equal(found, tokens)


def refusals(rank: int) -> list[str]:
    said = []
    for layout in (
        Layout(4, fields={"num_attention_heads": 2}),
        Layout(4, fields={"intermediate_size": 66}),
        Layout(4, sequence=True),
    ):
        with pytest.raises(ValueError) as raised:
            layout.of_rank(rank).train()(**batch(length=15))
        said.append(str(raised.value))
    assert Layout(4, sequence=True).of_rank(rank).eval()(**batch(length=15)).loss > 0
    return said


def test_what_does_not_divide_is_refused():
    refused, advice = "does not divide by parallel.tensor=4", "make it a multiple of 4, or use fewer ranks"
    assert run_ranks(refusals, 4)[0] == [
        f"num_attention_heads=2 {refused}; {advice}: 1, 2",
        f"intermediate_size=66 {refused}; {advice}: 1, 2, 3",
        f"parallel.sequence is on, and the sequence length=15 {refused}; {advice}: 1, 3",
    ]


def compiled_pass(rank: int) -> tuple[Pass, Pass]:
    layout = Layout(2, fields={"num_hidden_layers": 1})
    compiled = layout.of_rank(rank)
    compiled.gpt_neox.layers[0].compile(backend="eager")
    return train_pass(layout.of_rank(rank), batch()), train_pass(compiled, batch())


def test_a_compiled_block_is_split_around_its_messages():
    for plain, compiled in run_ranks(compiled_pass, 2):
        assert torch.equal(plain.loss, compiled.loss)
        for name, (_, gradient) in plain.pieces.items():
            assert torch.equal(compiled.pieces[name][1], gradient), name
