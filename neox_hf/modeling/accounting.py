"""How many parameters a configuration has, and how much work a token is. Pure arithmetic: nothing is built."""

from neox_hf.modeling.configuration import GPTNeoXConfig


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
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_length
    return float(6 * (matrix_parameters(config) + head) + attention)
