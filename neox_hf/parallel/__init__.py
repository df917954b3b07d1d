"""How one run is laid out over processes."""

from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.topology import Topology

__all__ = ["ParallelSettings", "Topology"]
