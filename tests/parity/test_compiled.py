"""torch.compile traces a whole training step in one graph, and no mask is built that `is_causal` can say."""

import pytest
import torch
from transformers import StaticCache

LENGTH = 24


class Recorder:
    """A compiler backend that runs the graph as it is, and keeps it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def attention_calls(self):
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return [node for node in nodes if node.target is torch.nn.functional.scaled_dot_product_attention]

    def square_tensors(self):
        """Tensors of the graph whose last two sizes are LENGTH: masks, since attention itself is one call."""
        values = [node.meta.get("example_value") for graph in self.graphs for node in graph.graph.nodes]
        return [v for v in values if isinstance(v, torch.Tensor) and tuple(v.shape[-2:]) == (LENGTH, LENGTH)]


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    recorder = Recorder()

    def make(model):
        return torch.compile(model, fullgraph=True, backend=recorder, dynamic=False)

    yield make, recorder
    torch._dynamo.reset()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_training_step_has_no_mask(parallel, use_cache, compiled, make_pair, tokens):
    make, recorder = compiled
    pair = make_pair(use_parallel_residual=parallel)
    ids = tokens(length=LENGTH)
    wanted = pair.stock(ids, labels=ids)
    found = make(pair.ours.train())(input_ids=ids, labels=ids, use_cache=use_cache)
    found.loss.backward()
    assert torch.allclose(found.loss, wanted.loss, rtol=1e-5)
    assert pair.ours.gpt_neox.embed_in.weight.grad.abs().max() > 0
    calls = recorder.attention_calls()
    assert len(calls) == 2
    for call in calls:
        assert call.kwargs.get("attn_mask") is None
        assert call.kwargs["is_causal"] is True
    assert recorder.square_tensors() == []


def test_packed_documents_still_do_not_see_each_other(compiled, make_pair, tokens):
    make, recorder = compiled
    pair = make_pair()
    ids = tokens(length=LENGTH)
    positions = torch.cat((torch.arange(7), torch.arange(17))).repeat(2, 1)
    found = make(pair.ours)(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert all(call.kwargs["attn_mask"] is not None for call in recorder.attention_calls())
    assert recorder.square_tensors() != []
    apart = torch.cat([pair.ours(part, use_cache=False).logits for part in (ids[:, :7], ids[:, 7:])], dim=1)
    assert torch.allclose(found, apart, atol=1e-5)


def test_padding_still_masks(compiled, make_pair, tokens):
    make, _ = compiled
    pair = make_pair()
    ids = tokens(length=LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = make(pair.ours)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[0, 5:], pair.stock(ids, attention_mask=mask, use_cache=False).logits[0, 5:], atol=1e-5)


def test_static_cache_decodes_in_one_graph(compiled, make_pair, tokens):
    make, _ = compiled
    model = make_pair().ours.eval()
    ids = tokens(length=LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    wanted = model(ids, use_cache=False).logits[:, -1]
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        found = make(model)(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gradient_checkpointing_compiles(compiled, make_pair, tokens):
    make, recorder = compiled
    pair = make_pair()
    pair.ours.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(length=LENGTH)
    found = make(pair.ours)(input_ids=ids, labels=ids, use_cache=False)
    found.loss.backward()
    assert torch.allclose(found.loss, pair.stock(ids, labels=ids).loss, rtol=1e-5)
    assert len(recorder.graphs) == 1
