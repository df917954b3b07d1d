"""`train.torch_compile`: each layer by itself, under every engine.

All layers have one code, so that a compiler is done after the first; of a whole model's graph it makes as many copies
as there are layers, which takes it minutes, and a pipeline's schedule is no graph at all. What lies around the layers
is embedding, norm, and head with loss, for which kernels are written.
"""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from neox_hf.training.arguments import NeoXTrainingArguments


def compile_layers(model: nn.Module, args: NeoXTrainingArguments, accelerator: Accelerator) -> None:
    """Compile the layers in place where the run compiles, and keep `accelerator` from compiling what they lie in.

    A model without blocks as transformers has them stays Accelerate's, which compiles it as a whole.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not args.torch_compile or not layers:
        return
    chosen = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    for layer in layers:
        layer.compile(**chosen.to_kwargs())
