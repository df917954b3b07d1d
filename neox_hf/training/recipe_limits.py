"""The range of each number in a recipe, one row each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neox_hf.config import Problem


@dataclass(frozen=True)
class Limit:
    """An interval; `above` and `below` leave their end out, `at_least` and `at_most` keep it."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def admits(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {end:g}" for words, end in ends.items() if end is not None)


COUNT = Limit(at_least=1)
NOT_NEGATIVE = Limit(at_least=0)
POSITIVE = Limit(above=0)
SHARE = Limit(at_least=0, at_most=1)
PROBABILITY = Limit(at_least=0, below=1)

LIMITS: dict[str, dict[str, Limit]] = {
    "model": {
        "vocab_size": COUNT,
        "num_hidden_layers": COUNT,
        "hidden_size": COUNT,
        "num_attention_heads": COUNT,
        "intermediate_size": COUNT,
        "max_position_embeddings": COUNT,
        "rotary_pct": Limit(above=0, at_most=1),
        "rotary_emb_base": POSITIVE,
        "layer_norm_eps": POSITIVE,
        "hidden_dropout": PROBABILITY,
        "attention_dropout": PROBABILITY,
        "initializer_range": POSITIVE,
    },
    "data": {
        "eval_fraction": PROBABILITY,
        "eval_samples": COUNT,
        "seq_length": COUNT,
        "streams": COUNT,
        "seed": NOT_NEGATIVE,
        "max_line_bytes": COUNT,
        "workers": NOT_NEGATIVE,
    },
    "parallel": {"tensor": COUNT, "pipeline": COUNT, "zero_stage": Limit(at_least=0, at_most=3)},
    "train": {
        "per_device_train_batch_size": COUNT,
        "per_device_eval_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "global_batch_size": COUNT,
        "max_steps": COUNT,
        "learning_rate": NOT_NEGATIVE,
        "min_lr": NOT_NEGATIVE,
        "lr_warmup_fraction": SHARE,
        "lr_decay_steps": COUNT,
        "warmup_steps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "adam_beta1": PROBABILITY,
        "adam_beta2": PROBABILITY,
        "adam_epsilon": POSITIVE,
        "max_grad_norm": NOT_NEGATIVE,
        "z_loss": NOT_NEGATIVE,
        "logging_steps": POSITIVE,
        "eval_steps": POSITIVE,
        "eval_delay": NOT_NEGATIVE,
        "eval_accumulation_steps": COUNT,
        "save_steps": POSITIVE,
        "save_total_limit": COUNT,
        "seed": NOT_NEGATIVE,
        "torch_empty_cache_steps": COUNT,
        "max_skipped_steps": NOT_NEGATIVE,
        "peak_tflops": POSITIVE,
        "ddp_timeout": COUNT,
        "ddp_bucket_cap_mb": COUNT,
    },
}


def limit_problems(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each number outside its range; unset ones are skipped."""
    for section, rows in LIMITS.items():
        for key, limit in rows.items():
            value = getattr(sections[section], key)
            if value is not None and not limit.admits(value):
                yield Problem((section, key), value, f"must be {limit}")
