"""How many parameters a configuration has, in all and on each rank, and how much work a token is.

No weight exists here: what is built is built on the meta device.
"""

import dataclasses

import torch

from neox_hf.modeling.causal_lm import GPTNeoXForCausalLM
from neox_hf.modeling.configuration import GPTNeoXConfig
from neox_hf.modeling.partition import Partition, stage_bounds
from neox_hf.modeling.stage import Stage
from neox_hf.parallel.topology import Topology


def parameter_count(config: GPTNeoXConfig) -> int:
    """Every parameter of `GPTNeoXForCausalLM`, a tied head counted once."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention_biases = 4 * hidden if config.attention_bias else 0
    mlp_biases = inner + hidden
    norms = 4 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    final_norm = 2 * hidden
    return matrix_parameters(config) + layers * (attention_biases + mlp_biases + norms) + embeddings + final_norm


def matrix_parameters(config: GPTNeoXConfig) -> int:
    """Weights of the blocks that take part in matrix products."""
    hidden = config.hidden_size
    return config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)


def flops_per_token(config: GPTNeoXConfig, seq_length: int) -> float:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_length` tokens.

    6 x (parameters in matrix products, the head included, tied or not) + 12 x layers x hidden x seq_length: attention
    counted full, not causal (PaLM, arXiv 2204.02311, appendix B). Recomputation never counts.
    """
    head = config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer_flops_per_token(config, seq_length) + 6.0 * head


def layer_flops_per_token(config: GPTNeoXConfig, seq_length: int) -> float:
    """One layer's part of `flops_per_token`."""
    matrices = matrix_parameters(config) / config.num_hidden_layers
    return 6 * matrices + 12.0 * config.hidden_size * seq_length


def rank_parameters(
    config: GPTNeoXConfig, *, tensor: int = 1, pipeline: int = 1, partition: Partition = "parameters"
) -> list[list[int]]:
    """Parameters that each rank of one replica holds in memory: a list of pipeline ranks, each one of tensor ranks.

    The vocabulary's padding counts; what several ranks hold (norms, biases of row-parallel linears, an embedding tied
    across stages) counts on each.

    Raises:
        TopologyError: the model cannot be split so.
    """
    topology = Topology(tensor=tensor, pipeline=pipeline)
    bounds = stage_bounds(config, pipeline, partition)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config, topology)
    stages = [
        Stage.of_rank(model, dataclasses.replace(topology, rank=stage * tensor), bounds) for stage in range(pipeline)
    ]
    # Shares along a dimension are of one size: all ranks of a tensor group hold as many.
    return [[sum(parameter.numel() for parameter in stage.parameters())] * tensor for stage in stages]
