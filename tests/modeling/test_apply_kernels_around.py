"""Whatever is attached to a stock model, or trains it, works with our kernels: hooks, losses, adapters, trainers."""

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import Trainer, TrainingArguments

from neox_hf import apply_kernels
from neox_hf.modeling.attention import GPTNeoXAttention
from tests.modeling.stock_steps import assert_near, assert_same_step


@pytest.mark.parametrize(
    "watched",
    [
        "layers.0",
        "layers.0.input_layernorm",
        "layers.0.attention",
        "layers.0.attention.dense",
        "layers.0.mlp",
        "layers.0.mlp.dense_h_to_4h",
        "layers.0.mlp.act",
        "final_layer_norm",
        "rotary_emb",
    ],
)
def test_hooks_stay(watched, make_stock, tokens):
    model = make_stock()
    outputs = []
    first_of = {"layers.0.attention", "rotary_emb"}
    part = model.gpt_neox.get_submodule(watched)
    part.register_forward_hook(lambda _, __, output: outputs.append(output[0] if watched in first_of else output))
    model(tokens())
    apply_kernels(model, "triton")(tokens()[:, :16])
    assert len(outputs) == 2
    width = outputs[1].shape[-1]  # one angle stands for two columns
    assert_near(outputs[1], outputs[0][..., :width])


def test_accelerate_hooks_call_the_new_forward(make_stock, tokens):
    model = make_stock()
    wanted = model(tokens()).logits
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    apply_kernels(model, "torch")
    assert_near(model(tokens()).logits, wanted)
    attention = model.gpt_neox.layers[0].attention
    assert attention._old_forward.__func__ is GPTNeoXAttention.forward


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_hooks_of_all_modules_are_called(kernels, make_pair, tokens):
    """torch's global ones, which stand on no module."""

    def double(module, _, output):
        return 2 * output if isinstance(module, nn.LayerNorm) else None

    before, after = make_pair(kernels=kernels, num_hidden_layers=1)
    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_near(after(tokens()).logits, before(tokens()).logits)
    finally:
        hook.remove()


# Head and loss in one operation


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_without_logits(kernels, make_pair, tokens):
    before, after = make_pair(kernels=kernels, num_hidden_layers=1)
    apply_kernels(after, kernels, skip_logits=True)
    before.train()
    after.train()
    ids = tokens(length=8)
    assert after(ids, labels=ids).logits is None
    assert_same_step(before, after, input_ids=ids, labels=ids)
    assert_near(after(ids).logits, before(ids).logits)
    after.eval()
    assert_near(after(ids, labels=ids).logits, before(ids).logits)
    assert after(ids, labels=ids, skip_logits=True).logits is None
    apply_kernels(after, kernels).train()
    assert after(ids, labels=ids).logits is not None


@pytest.mark.parametrize("what", ["loss", "head", "hook"])
def test_logits_are_made_where_head_or_loss_is_another(what, make_stock, tokens):
    model = make_stock()
    if what == "loss":
        model.loss_function = lambda logits, labels, **_: logits.float().sum() * 0 + 7
    elif what == "head":
        model.lm_head = nn.Sequential(model.lm_head)
    else:
        model.lm_head.register_forward_hook(lambda _, __, output: output * 2)
    wanted = model(tokens(), labels=tokens())
    found = apply_kernels(model, skip_logits=True).train()(tokens(), labels=tokens())
    assert_near(found.loss, wanted.loss)
    assert_near(found.logits, wanted.logits)


# Adapters and trainers


LORA = {
    "r": 4,
    "init_lora_weights": False,
    "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "modules_to_save": ["input_layernorm"],
}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("order", ["adapter first", "kernels first"])
def test_lora(order, kernels, make_stock, tokens, tmp_path):
    def adapted(model):
        torch.manual_seed(2)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))

    before = adapted(make_stock(num_hidden_layers=1))
    if order == "adapter first":
        after = apply_kernels(adapted(make_stock(num_hidden_layers=1)), kernels)
    else:
        after = adapted(apply_kernels(make_stock(num_hidden_layers=1), kernels))
    ids = tokens(length=8)
    assert_same_step(before, after, input_ids=ids, labels=ids)
    after.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_stock(num_hidden_layers=1), tmp_path)
    assert_near(loaded(ids).logits, before(ids).logits)
    merged = after.merge_and_unload()
    assert_near(merged(ids).logits, before(ids).logits)
    assert {type(module) for module in merged.gpt_neox.layers.modules()} & {nn.Linear, nn.LayerNorm} == set()


def test_an_adapter_on_the_head_takes_part_in_the_loss(make_stock, tokens):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["lm_head"])
    model = peft.get_peft_model(make_stock(), config)
    wanted = model(tokens(), labels=tokens())
    found = apply_kernels(model, skip_logits=True).train()(tokens(), labels=tokens())
    assert_near(found.loss, wanted.loss)


def test_stock_trainer_takes_the_same_steps(make_stock, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=12)]
    histories = []
    for switch in (lambda model: model, lambda model: apply_kernels(model, "torch", skip_logits=True)):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        options |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, disable_tqdm=True, **options)
        trainer = Trainer(switch(make_stock()), arguments, train_dataset=rows)
        trainer.train()
        histories.append([[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log])
    wanted, found = torch.tensor(histories)
    assert wanted.shape == (3, 2)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_quantized_linears_stay(make_stock, tokens):
    class Halved(nn.Linear):
        """Stands for a quantized linear: a subclass whose weight is not what it multiplies by."""

        def forward(self, x):
            return super().forward(x) / 2

    model = make_stock()
    linears = [module for module in model.gpt_neox.layers.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.__class__ = Halved
    wanted = model(tokens()).logits
    assert_near(apply_kernels(model, "triton")(tokens()).logits, wanted)
    assert all(type(linear) is Halved for linear in linears)
