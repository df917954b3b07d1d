"""Activations and gradients of neighbouring stages by copies (`parallel.neighbour`), where DeepSpeed has the backend
carry them.

DeepSpeed's first message of each shape, which is preceded by a description of it, stays with DeepSpeed, as do messages
for which there is no room yet.
"""

from collections.abc import Callable

from deepspeed.runtime.pipe.engine import PipelineEngine as Driver
from deepspeed.runtime.pipe.schedule import RecvActivation, RecvGrad, SendActivation, SendGrad
from torch import Tensor

from neox_hf.parallel.neighbour import Neighbour
from neox_hf.parallel.peer_memory import bytes_of
from neox_hf.parallel.topology import Topology

Piece = Tensor | tuple[Tensor, ...]
"""What DeepSpeed hands from stage to stage."""


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
        commands: dict[type, Callable[..., None]] = {}
        if following is not None:
            commands[SendActivation] = self._send_activations(following)
            commands[RecvGrad] = self._receive_gradients(following)
        if previous is not None:
            commands[RecvActivation] = self._receive_activations(previous)
            commands[SendGrad] = self._send_gradients(previous)
        driver._INSTRUCTION_MAP = driver._INSTRUCTION_MAP | commands

    @property
    def wait_for_no_one(self) -> bool:
        """Whether gradients leave for the stage before without it."""
        return self._previous is not None and self._previous.has_room

    def make_room(self) -> None:
        """For messages as large as there have been. All ranks come here at once, before a step."""
        for neighbour, size in self._largest.items():
            neighbour.make_room(size, self._driver.device)

    def _carries(self, neighbour: Neighbour, tensors: list[Tensor]) -> bool:
        self._largest[neighbour] = max(self._largest[neighbour], bytes_of(tensors))
        return neighbour.carries(tensors)

    def _send_activations(self, neighbour: Neighbour) -> Callable[..., None]:
        def send(driver: Driver, buffer_id: int) -> None:
            outputs = _each(driver.pipe_buffers["outputs"][buffer_id])
            if not self._carries(neighbour, outputs) or driver.first_output_send:
                Driver._exec_send_activations(driver, buffer_id)
            else:
                neighbour.send(outputs)

        return send

    def _receive_activations(self, neighbour: Neighbour) -> Callable[..., None]:
        def receive(driver: Driver, buffer_id: int) -> None:
            known = driver.pipe_recv_buf
            if known is None or not self._carries(neighbour, _each(known)):
                Driver._exec_recv_activations(driver, buffer_id)
                self._carries(neighbour, _each(driver.pipe_recv_buf))
                return
            inputs = tuple(neighbour.receive(_each(known)))
            for tensor in inputs:
                tensor.requires_grad_(tensor.is_floating_point())
            driver.pipe_buffers["inputs"][buffer_id] = inputs if isinstance(known, tuple) else inputs[0]

        return receive

    def _send_gradients(self, neighbour: Neighbour) -> Callable[..., None]:
        def send(driver: Driver, buffer_id: int) -> None:
            gradients = [tensor.grad for tensor in _trained(driver.pipe_buffers["inputs"][buffer_id])]
            if not self._carries(neighbour, gradients):
                Driver._exec_send_grads(driver, buffer_id)
                return
            neighbour.send(gradients)
            driver.pipe_buffers["inputs"][buffer_id] = None

        return send

    def _receive_gradients(self, neighbour: Neighbour) -> Callable[..., None]:
        def receive(driver: Driver, buffer_id: int) -> None:
            outputs = driver.pipe_buffers["outputs"][buffer_id]
            if not self._carries(neighbour, _trained(outputs)):
                Driver._exec_recv_grads(driver, buffer_id)
                return
            gradients = neighbour.receive(_trained(outputs))
            driver.grad_layer = gradients if isinstance(outputs, tuple) else gradients[0]

        return receive


def _each(piece: Piece) -> list[Tensor]:
    return list(piece) if isinstance(piece, tuple) else [piece]


def _trained(piece: Piece) -> list[Tensor]:
    """Those that have gradients."""
    return [tensor for tensor in _each(piece) if tensor.is_floating_point()]
