"""Models with packed documents and padding on a GPU: what SDPA computes with a mask, without one."""

import pytest
import torch
from transformers import DynamicCache

from neox_hf import GPTNeoXConfig
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from tests.modeling.small import SMALL

pytestmark = pytest.mark.gpu

LENGTH = 600


def model_of(head_size: int, kernels: str) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 2 * head_size, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL | sizes, kernels=kernels)).cuda()


def gradients(model, ids, labels, dtype, **arguments):
    model.to(dtype)(ids, labels=labels, **arguments).loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def given(kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    kept = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda")
    if kind == "documents":
        rows = [[*range(40), *range(460), *range(100)], [*range(512), *range(88)]]
        return kept, {"position_ids": torch.tensor(rows, device="cuda")}
    kept[0, slice(0, 200) if kind == "padding before" else slice(-200, None)] = False
    return kept, {"attention_mask": kept.long()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [16, 64, 80])
@pytest.mark.parametrize("kind", ["documents", "padding before", "padding after"])
def test_it_is_sdpas(kind, head_size, dtype):
    """`kernels: torch` has SDPA take the mask. Both are held against fp32."""
    ids = torch.randint(0, SMALL["vocab_size"], (2, LENGTH), device="cuda")
    kept, arguments = given(kind)
    labels = ids.masked_fill(~kept, -100)
    truth = gradients(model_of(head_size, "torch"), ids, labels, torch.float32, **arguments)
    masked = gradients(model_of(head_size, "torch"), ids, labels, dtype, **arguments)
    ours = gradients(model_of(head_size, "auto"), ids, labels, dtype, **arguments)
    for name, wanted in truth.items():
        error, of_sdpa = ((found[name] - wanted).norm() / wanted.norm() for found in (ours, masked))
        assert error <= 1.1 * of_sdpa + (1e-3 if dtype == torch.float32 else 2e-3), name


def test_compiles_into_one_graph():
    ids = torch.randint(0, SMALL["vocab_size"], (2, LENGTH), device="cuda")
    for kind in ("documents", "padding after"):
        torch._dynamo.reset()
        kept, arguments = given(kind)
        labels = ids.masked_fill(~kept, -100)
        wanted = gradients(model_of(64, "auto"), ids, labels, torch.float32, **arguments)
        model = model_of(64, "auto")
        model.forward = torch.compile(model.forward, fullgraph=True)
        found = gradients(model, ids, labels, torch.float32, use_cache=False, **arguments)
        for name, value in wanted.items():
            assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


@torch.no_grad()
def test_a_padded_prompt_goes_into_a_cache():
    """The first pass by spans, the next under a mask, as `generate` has them."""
    ids = torch.randint(0, SMALL["vocab_size"], (2, 101), device="cuda")
    kept = torch.ones_like(ids)
    kept[1, :37] = 0
    logits = {}
    for kernels in ("torch", "auto"):
        model = model_of(64, kernels).eval()
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :100], attention_mask=kept[:, :100], past_key_values=cache, use_cache=True).logits
        after = model(ids[:, 100:], attention_mask=kept, past_key_values=cache, use_cache=True).logits
        logits[kernels] = torch.cat((first, after), dim=1)[kept.bool()]
    torch.testing.assert_close(logits["auto"], logits["torch"], rtol=1e-3, atol=1e-4)
