"""What each optimizer takes by `train.optim_args`. transformers reads the keys it knows and passes over all others."""

SGD = ("momentum", "dampening", "weight_decay", "nesterov")
ADAGRAD = ("lr_decay", "weight_decay", "eps")
RMSPROP = ("momentum", "alpha", "eps", "weight_decay", "centered")
ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
ANYPRECISION = ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype")
GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
GROKADAMW = ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")

TAKEN: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("sgd", SGD),
    ("adagrad", ADAGRAD),
    ("rmsprop_", None),
    ("rmsprop", RMSPROP),
    ("ademamix", ADEMAMIX),
    ("paged_ademamix", ADEMAMIX),
    ("adamw_anyprecision", ANYPRECISION),
    ("adamw_torch_4bit", ("block_size", "bf16_stochastic_round")),
    ("adamw_torch_8bit", ("block_size", "bf16_stochastic_round")),
    ("galore_", GALORE),
    ("apollo_", (*GALORE, "proj", "scale_type")),
    ("grokadamw", GROKADAMW),
    ("schedule_free_", ("weight_lr_power", "r")),
    ("stable_adamw", ("max_lr", "kahan_sum", "decouple_lr")),
)
"""By how names of optimizers begin, the first that fits; None: the optimizer is given all, and refuses by itself. The
rest take nothing: their numbers have fields of their own."""


def taken_by(optimizer: str) -> tuple[str, ...] | None:
    """The keys of `optim_args` that this value of `train.optim` takes; None: it says so itself."""
    return next((keys for start, keys in TAKEN if optimizer.startswith(start)), ())


def arguments_problem(optimizer: str, arguments: str | None) -> str | None:
    """What is wrong with `arguments`, a text such as `momentum=0.9,nesterov=true`; None where nothing is."""
    taken = taken_by(optimizer)
    given = [pair.split("=") for pair in (arguments or "").replace(" ", "").split(",")] if arguments else []
    if any(len(pair) != 2 for pair in given):
        return "is not of the form key=value,key=value"
    unknown = [key for key, _ in given if taken is not None and key not in taken]
    if not unknown:
        return None
    takes = f"takes {', '.join(taken)}" if taken else "takes none: its numbers are fields of train"
    return f"has {', '.join(unknown)}, and optim={optimizer} {takes}; remove what it does not take"
