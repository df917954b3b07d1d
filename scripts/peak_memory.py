"""The most memory that any rank's device has held."""

import torch
import torch.distributed as dist


def peak_memory() -> dict[str, float]:
    """GiB that tensors took, and GiB that the allocator held for them, which counts what CUDA graphs keep. All ranks
    call it, and get the largest of all."""
    if not torch.cuda.is_available():
        return {"peak_gib": 0.0, "reserved_gib": 0.0}
    mine = (torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30)
    everyone = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return dict(zip(("peak_gib", "reserved_gib"), map(max, zip(*everyone, strict=True)), strict=True))
