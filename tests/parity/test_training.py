"""transformers' own Trainer, and PEFT, take our class as they take theirs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

STEPS = 20


class Rows(torch.utils.data.Dataset):
    """Sequences of unequal label counts, so that weighting by token shows."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[: index % 7] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def losses(model, rows, directory, **settings):
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    set_seed(0)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_stock_trainer_follows_the_stock_class(settings, make_pair, tokens, tmp_path):
    pair = make_pair()
    rows = Rows(tokens(rows=16))
    wanted = losses(pair.stock, rows, tmp_path / "stock", **settings)
    found = losses(pair.ours, rows, tmp_path / "ours", **settings)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_lora_follows_the_stock_class(make_pair, tokens, tmp_path):
    pair = make_pair()
    rows = Rows(tokens(rows=16))
    curves = []
    for name in ("stock", "ours"):
        set_seed(0)
        # No target modules: PEFT knows those of model type gpt_neox.
        adapted = get_peft_model(getattr(pair, name), LoraConfig(r=4, task_type="CAUSAL_LM"))
        assert sum(p.requires_grad for p in adapted.parameters()) == 4
        curves.append(losses(adapted, rows, tmp_path / name))
    assert curves[0][-1] < curves[0][0]
    assert torch.allclose(curves[1], curves[0], rtol=1e-5)


def test_adapters_on_every_linear_and_trained_norms(make_pair, tokens):
    pair = make_pair()
    settings = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["input_layernorm"], task_type="CAUSAL_LM")
    for name in ("stock", "ours"):
        set_seed(0)
        setattr(pair, name, get_peft_model(getattr(pair, name), settings))
    for model in (pair.stock, pair.ours):
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:  # lora_B starts at zero and would hide what lies behind it
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ids = tokens()
    wanted, found = (model(input_ids=ids, labels=ids) for model in (pair.stock, pair.ours))
    assert torch.allclose(found.logits, wanted.logits, atol=1e-4)
    wanted.loss.backward()
    found.loss.backward()
    gradients = {name: p.grad for name, p in pair.stock.named_parameters() if p.requires_grad}
    for name, parameter in pair.ours.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5 * float(gradients[name].abs().max()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, make_pair, tokens):
    plain, checkpointed = (make_pair(hidden_dropout=0.1).ours.train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids = tokens()
    steps = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        steps.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(steps[0][0], steps[1][0])
    assert all(torch.equal(a, b) for a, b in zip(steps[0][1], steps[1][1], strict=True))
    checkpointed.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in checkpointed.gpt_neox.layers)
