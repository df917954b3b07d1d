"""Documents become tokens, tokens become packed samples, in an order that is a function of the recipe alone."""

from neox_hf.data.evaluation import EvaluationBatches, evaluation_batches
from neox_hf.data.loader import StreamLoader
from neox_hf.data.settings import DataSettings, SourceSettings, TokenizerSettings
from neox_hf.data.state import merge_states
from neox_hf.data.stream import Sample, TokenStream
from neox_hf.data.tokenization import build_tokenizer

__all__ = [
    "DataSettings",
    "EvaluationBatches",
    "Sample",
    "SourceSettings",
    "StreamLoader",
    "TokenStream",
    "TokenizerSettings",
    "build_tokenizer",
    "evaluation_batches",
    "merge_states",
]
