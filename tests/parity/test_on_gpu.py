"""What only a CUDA device can show."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(make_pair):
    def make(**options):
        pair = make_pair(**options)
        pair.stock.cuda()
        pair.ours.cuda()
        return pair

    return make


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [False, True])
def test_fp32_step_equals_transformers(attention, packed, on_gpu, tokens, assert_same_step):
    ids = tokens().cuda()
    extra = {"position_ids": torch.cat((torch.arange(7), torch.arange(17))).repeat(2, 1).cuda()} if packed else {}
    pair = on_gpu(attention=attention)
    assert_same_step(pair, input_ids=ids, labels=ids, use_cache=False, **extra)


def test_flex_attention_has_gradients(on_gpu, tokens):
    ids = tokens(length=128).cuda()
    size = {"hidden_size": 128, "max_position_embeddings": 128}
    positions = torch.cat((torch.arange(50), torch.arange(78))).repeat(2, 1).cuda()
    gradients = []
    for attention in ("sdpa", "flex_attention"):
        model = on_gpu(attention=attention, **size).ours
        model(ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for wanted, found in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, atol=2e-3 * float(wanted.abs().max()))  # flex multiplies in tf32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_low_precision_is_no_further_from_the_truth(dtype, head_size, on_gpu, tokens):
    """Logits and the gradient of every parameter, as root mean squares over the model, against fp32."""
    options = {"hidden_size": 4 * head_size, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 512}
    options |= {"intermediate_size": 16 * head_size, "max_position_embeddings": 512}
    ids = tokens(rows=4, length=512, vocabulary=512).cuda()
    low, exact = on_gpu(dtype=dtype, **options), on_gpu(**options).stock
    exact.load_state_dict({name: value.float() for name, value in low.stock.state_dict().items()})
    truth = exact(ids, labels=ids, use_cache=False)
    truth.loss.backward()
    errors = {}
    for name in ("stock", "ours"):
        model = getattr(low, name)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        logits = (output.logits.float() - truth.logits).norm() / truth.logits.norm()
        gradients = [
            (a.grad.float() - b.grad).norm() / b.grad.norm()
            for a, b in zip(model.parameters(), exact.parameters(), strict=True)
        ]
        errors[name] = torch.stack((logits, torch.stack(gradients).mean()))
    assert (errors["ours"] <= 1.05 * errors["stock"]).all(), errors
