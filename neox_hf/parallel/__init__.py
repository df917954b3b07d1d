"""How one run is laid out over processes."""

from neox_hf.parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocabulary_embedding,
    vocabulary_head,
    vocabulary_shard,
)
from neox_hf.parallel.leaving import BehindGelu, leave_by_parts
from neox_hf.parallel.linear import ColumnParallelLinear, Linear, RowParallelLinear, column_linear, enter, row_linear
from neox_hf.parallel.settings import ParallelSettings
from neox_hf.parallel.shards import Shard, Sharded, shards_of
from neox_hf.parallel.tensor_region import ALONE, TensorRegion
from neox_hf.parallel.topology import Topology

__all__ = [
    "ALONE",
    "BehindGelu",
    "ColumnParallelLinear",
    "Linear",
    "ParallelSettings",
    "RowParallelLinear",
    "Shard",
    "Sharded",
    "TensorRegion",
    "Topology",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "column_linear",
    "enter",
    "leave_by_parts",
    "row_linear",
    "shards_of",
    "vocabulary_embedding",
    "vocabulary_head",
    "vocabulary_shard",
]
