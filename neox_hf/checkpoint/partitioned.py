"""Parameters whose elements ZeRO-3 has dealt to the data ranks.

Between uses such a parameter is empty; `ds_tensor` is this rank's partition of its flattened elements, padded at the
end to equal sizes.
"""

from torch import Tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has taken this parameter over."""
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the parameter before it was partitioned, if it was."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def partition_range(tensor: Tensor, data_rank: int) -> tuple[int, int]:
    """First element and count of the real elements in a rank's partition."""
    size = tensor.ds_tensor.ds_numel
    start = min(size * data_rank, tensor.ds_numel)
    return start, min(size, tensor.ds_numel - start)


def partition_of(tensor: Tensor, data_rank: int) -> Tensor:
    """The real elements of this rank's partition, flat: a view."""
    return tensor.ds_tensor.detach().narrow(0, 0, partition_range(tensor, data_rank)[1])


def forget_gathered(tensor: Tensor) -> None:
    """Drop a gathered copy of a parameter whose partitions have been written to; it is gathered again when used."""
    tensor.partition([tensor])
