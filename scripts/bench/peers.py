"""The training step on transformers' own GPT-NeoX: as it comes, compiled, and tuned as well as is known.

    eager      SDPA, nothing else
    compile    `torch.compile` of the model as shipped
    fixed      compiled, and attention is told `is_causal`: some versions of transformers build the whole mask while
               they are traced (huggingface/transformers#48925)
    tuned      fixed, with Liger's fused head and loss

`amp` keeps fp32 weights, gradients and moments under bf16 autocast, `bf16` has all of them in bf16. The rest is the
same for all and for ours: batch, AdamW (fused), clipping at 1.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from scripts.bench import liger
from scripts.bench.sizes import Size
from scripts.bench.variants import Variant

WEIGHTS = {"amp": torch.float32, "bf16": torch.bfloat16}
INIT_STD = 0.02


class Peer:
    """One variant that can give back its memory between turns and keep what it has compiled.

    Raises:
        NotInstalled: it needs a package that is missing.
    """

    def __init__(self, size: Size, variant: Variant, device: torch.device) -> None:
        self.device, self.form, self.autocast = device, variant.form, variant.precision == "amp"
        config = size.config()
        torch.manual_seed(0)
        with device:
            self.model = stock.GPTNeoXForCausalLM(config).to(WEIGHTS[variant.precision]).train()
        self.tokens = torch.randint(config.vocab_size, (size.micro_batch, size.sequence), device=device)
        self.optimizer: torch.optim.AdamW | None = None
        self._loss = self._tuned_loss() if self.form == "tuned" else self._stock_loss()
        self._matrices = [p for p in self.model.parameters() if p.dim() > 1]
        self._bytes = [p.untyped_storage().nbytes() for p in self._matrices]

    def _stock_loss(self) -> Callable[[], Tensor]:
        model = self.model if self.form == "eager" else torch.compile(self.model, dynamic=False)
        return lambda: model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def _tuned_loss(self) -> Callable[[], Tensor]:
        head_and_loss = liger.linear_cross_entropy()
        trunk = torch.compile(self.model.gpt_neox, dynamic=False)
        labels = torch.full_like(self.tokens, -100)
        labels[:, :-1] = self.tokens[:, 1:]

        def loss() -> Tensor:
            hidden = trunk(self.tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            weight = self.model.lm_head.weight
            if self.autocast:
                hidden, weight = hidden.bfloat16(), weight.bfloat16()
            return head_and_loss(hidden, weight, labels.flatten())

        return loss

    def step(self) -> Tensor:
        mask = causal_without_mask() if self.form in ("fixed", "tuned") else contextlib.nullcontext()
        with mask, torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self._loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def take_memory(self) -> None:
        """Weights anew, of the same distribution, and an optimizer without state."""
        for matrix, size in zip(self._matrices, self._bytes, strict=True):
            if matrix.untyped_storage().nbytes() != size:
                matrix.untyped_storage().resize_(size)
                nn.init.normal_(matrix, std=INIT_STD)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def give_memory(self) -> None:
        """The parameters stay the objects that compiled code knows; their contents go."""
        self.optimizer = None
        for parameter in self.model.parameters():
            parameter.grad = None
        for matrix in self._matrices:
            matrix.untyped_storage().resize_(0)


@contextlib.contextmanager
def causal_without_mask() -> Iterator[None]:
    """transformers' SDPA is told `is_causal` where there is no mask; in eager mode it comes to that by itself."""
    own = stock.create_causal_mask
    stock.create_causal_mask = no_mask
    try:
        yield
    finally:
        stock.create_causal_mask = own


def no_mask(*_: object, **__: object) -> None:
    return None
