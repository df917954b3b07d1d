"""One file per op: equation, plain-torch reference, public function. Imports torch alone."""

from neox_hf.kernels.adamw import ADAMW, AdamWRates, AdamWTensors, adamw_
from neox_hf.kernels.attention import attention_backend, causal_attention
from neox_hf.kernels.bias_dropout_residual import (
    BIAS_DROPOUT_RESIDUAL,
    bias_dropout_residual,
    draw_dropout_seed,
)
from neox_hf.kernels.bias_gelu import BIAS_GELU, bias_gelu
from neox_hf.kernels.causal_softmax import CAUSAL_SOFTMAX, causal_softmax
from neox_hf.kernels.column_sums import column_sums
from neox_hf.kernels.cross_entropy import CROSS_ENTROPY, IGNORE_INDEX, cross_entropy
from neox_hf.kernels.dispatch import BACKENDS, Backend, Op, describe_choice
from neox_hf.kernels.document_attention import DOCUMENT_ATTENTION, document_attention, takes_documents
from neox_hf.kernels.dual_layer_norm import (
    ADD_DUAL_LAYER_NORM,
    DUAL_LAYER_NORM,
    RESIDUAL_DUAL_LAYER_NORM,
    add_dual_layer_norm,
    dual_layer_norm,
    residual_dual_layer_norm,
)
from neox_hf.kernels.embedding import EMBEDDING, embedding
from neox_hf.kernels.gradient_norm import GRADIENT_NORM, clip_coefficient, gradient_norm, gradient_square_sum
from neox_hf.kernels.layer_norm import (
    ADD_LAYER_NORM,
    LAYER_NORM,
    RESIDUAL_LAYER_NORM,
    add_layer_norm,
    layer_norm,
    residual_layer_norm,
)
from neox_hf.kernels.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from neox_hf.kernels.linear_gelu import linear_gelu
from neox_hf.kernels.residual_add import RESIDUAL_ADD, residual_add
from neox_hf.kernels.rms_norm import RMS_NORM, rms_norm
from neox_hf.kernels.rotary import ROTARY, rotary
from neox_hf.kernels.scale_norm import SCALE_NORM, scale_norm
from neox_hf.kernels.tensor_list import TensorTables

OPS: tuple[Op, ...] = (
    LAYER_NORM,
    RESIDUAL_LAYER_NORM,
    ADD_LAYER_NORM,
    DUAL_LAYER_NORM,
    RESIDUAL_DUAL_LAYER_NORM,
    ADD_DUAL_LAYER_NORM,
    RMS_NORM,
    SCALE_NORM,
    ROTARY,
    BIAS_GELU,
    RESIDUAL_ADD,
    EMBEDDING,
    BIAS_DROPOUT_RESIDUAL,
    CAUSAL_SOFTMAX,
    DOCUMENT_ATTENTION,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)

__all__ = [
    "ADAMW",
    "BACKENDS",
    "DOCUMENT_ATTENTION",
    "GRADIENT_NORM",
    "IGNORE_INDEX",
    "OPS",
    "AdamWRates",
    "AdamWTensors",
    "Backend",
    "Op",
    "TensorTables",
    "adamw_",
    "add_dual_layer_norm",
    "add_layer_norm",
    "attention_backend",
    "bias_dropout_residual",
    "bias_gelu",
    "causal_attention",
    "causal_softmax",
    "clip_coefficient",
    "column_sums",
    "cross_entropy",
    "describe_choice",
    "document_attention",
    "draw_dropout_seed",
    "dual_layer_norm",
    "embedding",
    "gradient_norm",
    "gradient_square_sum",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "residual_add",
    "residual_dual_layer_norm",
    "residual_layer_norm",
    "rms_norm",
    "rotary",
    "scale_norm",
    "takes_documents",
]
