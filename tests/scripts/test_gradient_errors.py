"""`scripts/gradient_errors.py` holds each precision's loss and gradients against fp32's, at the same weights."""

import json
import re

import gradient_errors
import pytest
import torch

from neox_hf.modeling import GPTNeoXConfig
from tests.runs import tiny_recipe, write_corpus

SIZES = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 32}


@pytest.fixture
def gradients() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "gpt_neox.embed_in.weight": (32, 16),
        "gpt_neox.layers.0.attention.query_key_value.weight": (48, 16),
        "gpt_neox.layers.1.attention.query_key_value.weight": (48, 16),
        "gpt_neox.layers.0.attention.query_key_value.bias": (48,),
        "gpt_neox.layers.1.attention.dense.weight": (16, 16),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_kinds_of_matrices(gradients):
    config = GPTNeoXConfig(**SIZES)
    found = list(gradient_errors.matrices(gradients, config))
    parts = [f"attention.query_key_value, {part}" for part in ("query", "key", "value")]
    assert [kind for kind, _ in found] == ["gpt_neox.embed_in", *parts, *parts, "attention.dense"]
    of_heads = gradients["gpt_neox.layers.0.attention.query_key_value.weight"].view(2, 3, 8, 16)
    assert torch.equal(found[2][1], of_heads[:, 1])


def test_distance_and_cosine(gradients):
    config = GPTNeoXConfig(**SIZES)
    longer = {name: 1.5 * gradient for name, gradient in gradients.items()}
    for distance, cosine in gradient_errors.distances(longer, gradients, config).values():
        assert (distance, cosine) == pytest.approx((0.5, 1.0))
    turned = {name: gradient.flip(-1) for name, gradient in gradients.items()}
    for kind, (distance, cosine) in gradient_errors.distances(turned, gradients, config).items():
        assert distance == pytest.approx((2 - 2 * cosine) ** 0.5), kind


def test_eight_bits_are_further_than_sixteen(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_recipe(corpus, tmp_path / "elsewhere")))
    options = ["--config", str(tmp_path / "tiny.json"), "--steps", "8", "--after", "0", "3", "--gradients", "2"]
    precisions = ["--precisions", "fp32", "amp", "bf16", "fp8"]
    monkeypatch.setattr("sys.argv", ["gradient_errors.py", *options, *precisions, "--set", "model.hidden_dropout=0"])
    gradient_errors.main()
    printed = capsys.readouterr().out
    assert re.findall(r"after (\d) steps, 2 batches", printed) == ["0", "3"]
    losses = [float(loss) for loss in re.findall(r"loss (\S+) in torch:fp32", printed)]
    assert losses[1] < losses[0]
    columns = "".join(rf" +{name} (\S+) \S+" for name in precisions[1:])
    rows = re.findall(rf"^ +(\S.*?){columns}$", printed, re.MULTILINE)
    assert len(rows) == 2 * 8
    for kind, *distances in rows:
        full, *sixteen, eight = map(float, distances)
        assert full < 1e-4 < min(sixteen), kind
        assert max(sixteen) < min(0.03, eight), kind
        assert eight < 0.4, kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precisions", "fp16"], "invalid choice: 'fp16'"),
        (["--after", "0", "9", "--steps", "8"], "[0, 9] must lie within the schedule's 0 to 8 steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["gradient_errors.py", "--config", "no such file", *arguments])
    with pytest.raises(SystemExit):
        gradient_errors.main()
    assert message in capsys.readouterr().err
