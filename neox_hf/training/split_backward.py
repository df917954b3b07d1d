"""A pipeline's backward pass in two halves: a stage sends back the gradient of what it has read, and then computes the
gradients of its weights.

The stage before waits for the first alone. When the last micro-batches go back through p stages, each stage waits for
p - 1 first halves, where it would for whole ones. What the halves compute is the same, in the same order.

Source: Qi et al., 2023, arXiv 2401.10241, which splits backward passes so; here the weights' gradients
are computed before the next forward pass, so that no stage holds more than it did.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine as Driver
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    PipeInstruction,
    RecvActivation,
    SendGrad,
    TrainSchedule,
)


class PostponedProducts:
    """Additions to weights' gradients that a backward pass asks for and that are computed behind it, in their order."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._collects = False

    @contextmanager
    def collected(self) -> Iterator[None]:
        """In this context `take` keeps what it is given."""
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    def take(self, product: Callable[[], None]) -> None:
        """Call `product` in `compute`, or now."""
        if self._collects:
            self._waiting.append(product)
        else:
            product()

    @torch.no_grad()  # as the backward pass would have
    def compute(self) -> None:
        """Call all that waits; each lets go of its operands."""
        while self._waiting:
            self._waiting.popleft()()


class WeightGradients(PipeInstruction):
    """Compute what the backward pass before has postponed."""


class SplitSchedule(TrainSchedule):
    """DeepSpeed's 1F1B with `WeightGradients`. in_pairs: of `with_weight_gradients`."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int, in_pairs: bool = True) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self._in_pairs = in_pairs

    def steps(self) -> Iterator[list[PipeInstruction]]:
        return with_weight_gradients(super().steps(), self._in_pairs)


def with_weight_gradients(
    steps: Iterable[list[PipeInstruction]], in_pairs: bool = True
) -> Iterator[list[PipeInstruction]]:
    """Behind each backward pass and the message that the stage before waits for, its gradient. No later: the next
    gradient may be received where this one lies, which postponed products read. So may activations, as DeepSpeed has
    it, for which `split_backward` sees to other memory.

    in_pairs: ranks send and receive in pairs, so that the stage before sends the next activations when it has got that
    gradient, and is not to wait for the products with them.
    """
    messages = (SendGrad, RecvActivation) if in_pairs else SendGrad
    due = False
    for commands in steps:
        found: list[PipeInstruction] = []
        for command in commands:
            if due and not isinstance(command, messages):
                found.append(WeightGradients())
                due = False
            found.append(command)
            due = due or isinstance(command, BackwardPass)
        yield found


def split_backward(driver: Driver, in_pairs: Callable[[], bool]) -> PostponedProducts:
    """Have `driver` run its backward passes in halves; what is given to the result in the first is computed in the
    second. in_pairs: asked before each step; see `with_weight_gradients`."""
    postponed = PostponedProducts()

    def first_half(driver: Driver, buffer_id: int) -> None:
        with postponed.collected():
            Driver._exec_backward_pass(driver, buffer_id)

    receive = driver._INSTRUCTION_MAP[RecvActivation]

    def into_memory_of_their_own(driver: Driver, buffer_id: int) -> None:
        receive(driver, buffer_id)
        # DeepSpeed would receive gradients where activations come in, and those come before products that read these.
        driver._grad_layer_buf = []

    halves = {
        BackwardPass: first_half,
        WeightGradients: lambda driver: postponed.compute(),
        RecvActivation: into_memory_of_their_own,
    }
    # DeepSpeed makes its engine by itself, and takes neither a class nor a schedule for it.
    driver._INSTRUCTION_MAP = driver._INSTRUCTION_MAP | halves
    driver._train_schedule = lambda: SplitSchedule(
        driver.micro_batches, driver.num_stages, driver.stage_id, in_pairs=in_pairs()
    )
    return postponed
