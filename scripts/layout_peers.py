"""What teams use today on several GPUs, on transformers' own GPT-NeoX: the peers of `bench_layouts.py` and `scale.py`.

    torchrun --nproc-per-node 2 scripts/layout_peers.py ddp result.json '{"model": {...}, "micro_batch": 4, ...}'

`ddp`: transformers' class under torch's DistributedDataParallel, fp32 weights with bf16 autocast. `pipeline`:
DeepSpeed's PipelineEngine, ZeRO-1, over transformers' blocks in bf16. Either may compile: the model, or its blocks.
`zero`: DeepSpeed's engine at a ZeRO stage over transformers' class in bf16, fp32 masters, fp32 accumulation.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from peak_memory import peak_memory
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig
from transformers.models.gpt_neox import modeling_gpt_neox as stock


@dataclasses.dataclass(frozen=True)
class Job:
    """model: fields of transformers' configuration. accumulation: micro-batches of a rank, or of a pipeline, a step.
    stage: of ZeRO. recompute: transformers' gradient checkpointing. Both are of `zero` alone."""

    model: dict
    micro_batch: int
    accumulation: int
    seq_length: int
    steps: int
    compiled: bool = False
    stage: int = 1
    recompute: bool = False


def device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def random_tokens(job: Job, columns: int) -> Tensor:
    return torch.randint(0, job.model["vocab_size"], (job.micro_batch, columns), device=device())


def ddp(job: Job) -> Callable[[], None]:
    dist.init_process_group()
    with device():
        model = stock.GPTNeoXForCausalLM(GPTNeoXConfig(**job.model, use_cache=False))
    replicas = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    forward = torch.compile(replicas) if job.compiled else replicas
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for number in range(job.accumulation):
            tokens = random_tokens(job, job.seq_length)
            last = number == job.accumulation - 1
            with contextlib.nullcontext() if last else replicas.no_sync():
                with torch.autocast(device().type, torch.bfloat16):
                    loss = forward(input_ids=tokens, labels=tokens).loss / job.accumulation
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Embedding(nn.Module):
    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed_in(tokens)


class Block(nn.Module):
    def __init__(self, config: GPTNeoXConfig, index: int) -> None:
        super().__init__()
        self.layer = stock.GPTNeoXLayer(config, index)
        self.rotary = stock.GPTNeoXRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.layer(hidden, position_embeddings=self.rotary(hidden, positions))


class Head(nn.Module):
    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))


def pipeline(job: Job) -> Callable[[], None]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed()
    config = GPTNeoXConfig(**job.model)
    config._attn_implementation = "sdpa"
    blocks = [LayerSpec(Block, config, index) for index in range(config.num_hidden_layers)]
    module = PipelineModule(
        [LayerSpec(Embedding, config), *blocks, LayerSpec(Head, config)],
        num_stages=dist.get_world_size(),
        loss_fn=lambda logits, labels: F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()),
    )
    if job.compiled:
        for layer in module.forward_funcs:
            layer.compile()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True),
        config=deepspeed_config(job, stage=1),
    )

    def micro_batches():
        while True:
            tokens = random_tokens(job, job.seq_length + 1)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    endless = micro_batches()
    return lambda: engine.train_batch(endless)


def deepspeed_config(job: Job, stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def zero(job: Job) -> Callable[[], None]:
    import deepspeed

    deepspeed.init_distributed()
    config = deepspeed_config(job, job.stage)
    whole = contextlib.nullcontext()
    parts = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16) if job.stage == 3 else whole
    with parts, device():
        model = stock.GPTNeoXForCausalLM(GPTNeoXConfig(**job.model, use_cache=False))
    if job.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(job.accumulation):
            tokens = random_tokens(job, job.seq_length)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    return step


def main() -> None:
    name, result, description = sys.argv[1:]
    job = Job(**json.loads(description))
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    step = {"ddp": ddp, "pipeline": pipeline, "zero": zero}[name](job)
    seconds = []
    for _ in range(job.steps):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = peak_memory()
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps({"seconds": seconds, **peak}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
