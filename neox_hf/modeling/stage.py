"""One pipeline rank's share of a model: the same modules that the whole model runs, called in the same order.

    first stage   embedding
    every stage   layers[start:stop]
    last stage    final norm, and the loss through the head

Between stages travel the hidden states [B, S, H] (their part of the sequence under sequence parallelism) and, where
documents are packed, position_ids [B, S].
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from neox_hf.errors import TopologyError
from neox_hf.kernels.weight_gradient import sum_of
from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.parallel.topology import Topology

Between = Tensor | tuple[Tensor, ...]
"""hidden states, or (hidden states, position_ids); into the first stage token ids take the place of the states."""


class Stage(nn.Module):
    """Runs the layers `[start, stop)` of `model`, and what stands before the first and behind the last.

    The stage registers the modules it runs and no others; `model` keeps every one under its HF name.
    """

    def __init__(self, model: GPTNeoXForCausalLM, topology: Topology, start: int, stop: int) -> None:
        super().__init__()
        self.is_first = topology.pipeline_rank == 0
        self.is_last = topology.is_last_stage
        self.layers = nn.ModuleList(model.gpt_neox.layers[start:stop])
        if self.is_first:
            self.embed_in = model.gpt_neox.embed_in
        if self.is_last:
            self.final_layer_norm = model.gpt_neox.final_layer_norm
            self.lm_head = model.lm_head
        self._model = (model,)  # in a tuple: a module that is set as an attribute is a submodule

    @classmethod
    def of_rank(cls, model: GPTNeoXForCausalLM, topology: Topology, bounds: list[int]) -> "Stage":
        """This rank's stage; `bounds` as of `stage_bounds`."""
        return cls(model, topology, *list(pairwise(bounds))[topology.pipeline_rank])

    @classmethod
    def of_materialised(cls, model: GPTNeoXForCausalLM, topology: Topology) -> "Stage":
        """The stage of what `model` holds here, the layers that are not on `meta`; the rest is not trained here."""
        held = [number for number, layer in enumerate(model.gpt_neox.layers) if not _is_on_meta(layer)]
        assert held, "no layer of the model is on this rank"
        begins, ends = held[0] == 0, held[-1] + 1 == len(model.gpt_neox.layers)
        if (begins, ends) != (topology.pipeline_rank == 0, topology.is_last_stage):
            raise TopologyError(
                f"stage {topology.pipeline_rank} of {topology.pipeline} has layers {held[0]} to {held[-1]} of "
                f"{len(model.gpt_neox.layers)} in memory, which are not its own: build the model with the topology, "
                "as neox_hf.training.first_model does"
            )
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and not parameter.is_meta)
        return cls(model, topology, held[0], held[-1] + 1)

    @property
    def model(self) -> GPTNeoXForCausalLM:
        return self._model[0]

    @property
    def local_modules(self) -> list[nn.Module]:
        """What this rank needs of the model in memory."""
        # The rotary frequencies are not registered with the stage: who casts the stage must leave them in fp32.
        return [self, self.model.gpt_neox.rotary_emb]

    def train(self, mode: bool = True) -> "Stage":
        """Training mode for the model too: it is asked how to run the layers, and no submodule here."""
        self.model.train(mode)
        return super().train(mode)

    def forward(self, received: Between) -> Between:
        """The next stage's input; of the last stage, the hidden states that are ready for the head, and its weight."""
        received, *positions = received if isinstance(received, tuple) else (received,)
        model = self.model.gpt_neox
        position_ids = positions[0] if positions else None
        hidden = model.embed(received) if self.is_first else received
        hidden, _ = model.run_layers(self.layers, hidden, position_ids=position_ids)
        if self.is_last:
            # The weight goes out with them so that every gradient comes back through the outputs: that is where
            # DeepSpeed begins a backward pass, by clearing what there is of bf16 gradients.
            head = self.lm_head.weight
            return model.finish(hidden), head.view_as(head)
        return (hidden, *positions) if positions else hidden

    def loss(self, outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Sum of the losses of next tokens [B, S] given the last stage's outputs, times a weight.

        labels: (next tokens, weight, what the backward pass brings to the sum: the weight, times what it brings here).
        """
        (hidden, head), (next_tokens, weight, upstream) = outputs, labels
        into = self._sum_of_head()
        return self.model.summed_loss(hidden, next_tokens, head, upstream, accumulate_into=into) * weight

    def _sum_of_head(self) -> Tensor | None:
        """Where the head's gradient is added as it is made, if somebody sums it: as a tensor of its own it would be
        cast, and cast again. A tied one waits for the embedding's."""
        head = self.lm_head.weight
        total = sum_of(head) if torch.is_grad_enabled() and head.requires_grad else None
        return None if total is None or self.model.config.tie_word_embeddings else total.total(head)


def _is_on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())
