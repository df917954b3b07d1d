"""Positions: the angles of the rotary embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from neox_hf.modeling.configuration import GPTNeoXConfig


class GPTNeoXRotaryEmbedding(nn.Module):
    """cos and sin of position x inverse frequency, once per forward pass for all layers.

    Frequencies are base^(-2i / R), i < R/2, where R = int(head size x rotary_pct); the scaled variants
    (`linear`, `dynamic`, `yarn`, ...) are transformers'. Both buffers can be made again from the configuration, so they
    are not saved.
    """

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.config = config
        # The names below are what `dynamic_rope_update` and transformers' meta-device initialisation read.
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        if self.rope_type == "default":
            frequencies, self.attention_scaling = self.compute_default_rope_parameters(config)
        else:
            frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: GPTNeoXConfig, device: torch.device | None = None, **_: object
    ) -> tuple[Tensor, float]:
        """Inverse frequencies fp32 [R/2], and the factor on cos and sin: 1."""
        rotated = int(config.head_size * config.rotary_pct)
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
        return 1.0 / (config.rotary_emb_base**exponents), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPTNeoXRotaryEmbedding":
        """Moves the frequencies, and leaves them fp32 when the model is cast: rounded, they are other positions."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(buffer.device)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B or 1, S, R/2], for position_ids int64 [B or 1, S]; hidden_states give the device."""
        frequencies = self.inv_freq.to(device=hidden_states.device, dtype=torch.float32)
        angles = position_ids[..., None].to(torch.float32) * frequencies
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
