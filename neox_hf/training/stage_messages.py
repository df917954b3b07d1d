"""Activations and gradients of neighbouring stages by copies (`parallel.neighbour`), where DeepSpeed has the backend
carry them.

DeepSpeed's first message of each shape, which is preceded by a description of it, stays with DeepSpeed, as do messages
for which there is no room yet.
"""

from functools import partial

from deepspeed.runtime.pipe.engine import PipelineEngine as Driver
from deepspeed.runtime.pipe.schedule import RecvActivation, RecvGrad, SendActivation, SendGrad
from torch import Tensor

from neox_hf.parallel.neighbour import Neighbour
from neox_hf.parallel.peer_memory import bytes_of
from neox_hf.parallel.topology import Topology


class StageMessages:
    """Has `driver` send and receive by copies what the devices can. Both ranks of a pair come to the same decisions, by
    the shapes of what they have sent and received."""

    def __init__(self, driver: Driver, topology: Topology) -> None:
        self._driver = driver
        previous, following = topology.groups.previous, topology.groups.next
        # Of the pairs that stages make, all whose first stage is even may meet at once, and then all others.
        pairs = [following, previous] if topology.pipeline_rank % 2 == 0 else [previous, following]
        self._largest = {neighbour: 0 for neighbour in pairs if neighbour is not None}
        self._previous = previous
        commands: dict[type, partial[None]] = {}
        if following is not None:
            commands[SendActivation] = partial(self._send_activations, following)
            commands[RecvGrad] = partial(self._receive_gradients, following)
        if previous is not None:
            commands[RecvActivation] = partial(self._receive_activations, previous)
            commands[SendGrad] = partial(self._send_gradients, previous)
        driver._INSTRUCTION_MAP = driver._INSTRUCTION_MAP | commands

    @property
    def in_pairs(self) -> bool:
        """Whether this stage sends its gradients when the one before receives them, and no sooner."""
        return self._previous is None or not self._previous.has_room

    def make_room(self) -> None:
        """For messages as large as there have been. All ranks come here at once, before a step."""
        for neighbour, size in self._largest.items():
            neighbour.make_room(size, self._driver.device)

    def _carries(self, neighbour: Neighbour, tensors: list[Tensor]) -> bool:
        self._largest[neighbour] = max(self._largest[neighbour], bytes_of(tensors))
        return neighbour.carries(tensors)

    def _send_activations(self, neighbour: Neighbour, driver: Driver, buffer_id: int) -> None:
        outputs = _each(driver.pipe_buffers["outputs"][buffer_id])
        if not self._carries(neighbour, outputs) or driver.first_output_send:
            Driver._exec_send_activations(driver, buffer_id)
        else:
            neighbour.send(outputs)

    def _receive_activations(self, neighbour: Neighbour, driver: Driver, buffer_id: int) -> None:
        known = driver.pipe_recv_buf
        if known is None or not self._carries(neighbour, _each(known)):
            Driver._exec_recv_activations(driver, buffer_id)
            self._carries(neighbour, _each(driver.pipe_recv_buf))  # how large it was
            return
        inputs = tuple(neighbour.receive(_each(known)))
        for tensor in inputs:
            tensor.requires_grad_(tensor.is_floating_point())
        driver.pipe_buffers["inputs"][buffer_id] = inputs if isinstance(known, tuple) else inputs[0]

    def _send_gradients(self, neighbour: Neighbour, driver: Driver, buffer_id: int) -> None:
        gradients = [tensor.grad for tensor in _trained(driver.pipe_buffers["inputs"][buffer_id])]
        if not self._carries(neighbour, gradients):
            Driver._exec_send_grads(driver, buffer_id)
            return
        neighbour.send(gradients)
        driver.pipe_buffers["inputs"][buffer_id] = None

    def _receive_gradients(self, neighbour: Neighbour, driver: Driver, buffer_id: int) -> None:
        outputs = driver.pipe_buffers["outputs"][buffer_id]
        if not self._carries(neighbour, _trained(outputs)):
            Driver._exec_recv_grads(driver, buffer_id)
            return
        gradients = neighbour.receive(_trained(outputs))
        driver.grad_layer = gradients if isinstance(outputs, tuple) else gradients[0]


def _each(handed: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What DeepSpeed hands from stage to stage is a tensor or several."""
    return list(handed) if isinstance(handed, tuple) else [handed]


def _trained(handed: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Those that have gradients."""
    return [tensor for tensor in _each(handed) if tensor.is_floating_point()]
