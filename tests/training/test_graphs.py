"""`train.cuda_graphs`: when layers are captured, and what is said where they cannot be."""

from types import SimpleNamespace

import pytest
import torch

from neox_hf import GPTNeoXConfig, GPTNeoXForCausalLM
from neox_hf.modeling.layer_graphs import PATIENCE
from neox_hf.modeling.presets import preset_config
from neox_hf.modeling.settings import ModelSettings
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.training.graphs import graph_layers, graph_problems, waits_for_host
from tests.modeling.small import SMALL

SETTINGS = {"cuda_graphs": True, "precision": "bf16", "torch_compile": False, "activation_checkpointing": None}
CUDA = torch.device("cuda")
ALONE, SHARED = SimpleNamespace(tensor=1), SimpleNamespace(tensor=2)


def section(**given):
    return SimpleNamespace(**(SETTINGS | given))


def problems(monkeypatch, train, model=None, parallel=None, cuda=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    return [
        problem.message for problem in graph_problems(train, model or ModelSettings(), parallel or ParallelSettings())
    ]


@pytest.fixture(scope="module")
def model():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, attn_implementation="sdpa"))


@pytest.fixture(autouse=True)
def no_graphs_left(model):
    yield
    model.gpt_neox.graphs = None


@pytest.mark.parametrize("setting", ["auto", False])
def test_who_does_not_ask_is_not_refused(monkeypatch, setting):
    assert problems(monkeypatch, section(cuda_graphs=setting, precision="fp32"), cuda=False) == []


def test_what_can_be_captured_is_no_problem(monkeypatch):
    assert problems(monkeypatch, section()) == []
    assert problems(monkeypatch, section(precision="pure_bf16", activation_checkpointing="selective")) == []


@pytest.mark.parametrize(
    ("given", "model_fields", "parallel", "words"),
    [
        (
            {"precision": "amp"},
            {},
            {},
            "train.precision = amp leaves gradients to autograd; use bf16 or",
        ),
        ({"torch_compile": True}, {}, {}, "train.torch_compile compiles the layers"),
        ({"activation_checkpointing": "full"}, {}, {}, "use selective or none"),
        ({}, {"hidden_dropout": 0.1}, {}, "the model has dropout"),
        ({}, {"attn_implementation": "eager"}, {}, "attention runs as eager, and only sdpa can be captured"),
        ({}, {}, {"zero_stage": 2}, "parallel.zero_stage = 2 moves gradients while the layers run"),
        (
            {},
            {},
            {"tensor": 2, "zero_stage": 1, "offload": "cpu"},
            "parallel.offload = cpu has gradients summed elsewhere",
        ),
    ],
)
def test_a_recipe_that_cannot_is_told_why(monkeypatch, given, model_fields, parallel, words):
    (message,) = problems(monkeypatch, section(**given), ModelSettings(**model_fields), ParallelSettings(**parallel))
    assert message.startswith("cannot be: ")
    assert words in message


def test_without_a_device_there_are_no_graphs(monkeypatch, model):
    assert problems(monkeypatch, section(), cuda=False) == ["cannot be: there is no CUDA device"]
    with pytest.raises(ValueError, match="cuda_graphs = true, but there is no CUDA device, but cpu; set it to auto"):
        graph_layers(model, section(device=torch.device("cpu")), ALONE)


def test_an_engine_has_a_reason_of_its_own(model):
    args = section(device=CUDA)
    with pytest.raises(ValueError, match="true, but replicas are busy; set it"):
        graph_layers(model, args, ALONE, reason="replicas are busy")
    args.cuda_graphs = "auto"
    graph_layers(model, args, SHARED, reason="replicas are busy")
    assert model.gpt_neox.graphs is None


def test_another_model_knows_of_no_graphs():
    with pytest.raises(ValueError, match="the model is a Linear, and only"):
        graph_layers(torch.nn.Linear(1, 1), section(device=CUDA), ALONE)


def taken(model, samples: int) -> bool:
    """Whether a pass over so many samples of 32 tokens would run as a graph, once it has come often enough."""
    hidden = torch.empty(1, 1, model.config.hidden_size, requires_grad=True).expand(samples, 32, -1)
    graphs = model.train().gpt_neox.graphs
    return [graphs.take(graphs.layers, hidden) for _ in range(PATIENCE + 1)][-1]


def test_auto_is_for_layers_that_ranks_share(model):
    graph_layers(model, section(cuda_graphs="auto", device=CUDA), SHARED)
    assert model.gpt_neox.graphs.layers is model.gpt_neox.layers
    assert taken(model, 10**9)


def test_auto_is_for_passes_that_would_wait_for_the_host(model):
    graph_layers(model, section(cuda_graphs="auto", device=CUDA), ALONE)
    assert taken(model, 1)
    assert not taken(model, 10**9)
    graph_layers(model, section(cuda_graphs=True, device=CUDA), ALONE)
    assert taken(model, 10**9)


def test_whoever_is_not_ready_waits(model):
    graph_layers(model, section(device=CUDA), ALONE, ready=lambda: False)
    assert not taken(model, 1)


@pytest.mark.parametrize(("samples", "size", "small"), [(8, "pythia-160m", True), (32, "pythia-160m", False)])
def test_what_waits_for_the_host(samples, size, small):
    config = preset_config(size)
    assert waits_for_host(config, torch.empty(samples, 2048, config.hidden_size, device="meta")) is small


@pytest.mark.parametrize(("setting", "unasked"), [(False, True), ("auto", False)])
def test_who_gets_none(model, setting, unasked):
    graph_layers(model, section(device=CUDA, cuda_graphs=setting), SHARED, unasked=unasked)
    assert model.gpt_neox.graphs is None


def test_who_asks_has_graphs(model):
    graph_layers(model, section(device=CUDA), ALONE, unasked=False)
    assert model.gpt_neox.graphs is not None


def test_some_layers_are_captured(model):
    layers = model.gpt_neox.layers[:1]
    graph_layers(model, section(device=CUDA), ALONE, layers=layers)
    assert model.gpt_neox.graphs.layers is layers
