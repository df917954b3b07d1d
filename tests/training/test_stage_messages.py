"""A pipeline whose stages send by copies, for which gloo stands here, computes what one does whose stages send by
DeepSpeed."""

from functools import partial

import pytest

from tests.runs import Runs
from tests.training.test_pipeline_runs import OPTIMIZER, different, final_log, run, tensors
from tests.training.test_split_backward import FOUR_MICRO_BATCHES


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("stage-messages"))


def by_copies(rank: int, strangers: tuple[int, ...] = ()) -> None:
    """As if devices reached each other, but for those of `strangers`. Says what was sent, and how."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from neox_hf.parallel import topology
    from neox_hf.parallel.neighbour import Neighbour
    from tests.parallel.gloo_copies import pair_of

    def told(how, call):
        def send(*given):
            print(f"sent by {how}")
            return call(*given)

        return send

    topology.Topology._may_copy = lambda self: True
    topology.Pair = partial(pair_of, near=lambda group, device: rank not in strangers)
    Neighbour.send = told("copies", Neighbour.send)
    for name in ("_exec_send_activations", "_exec_send_grads"):
        setattr(PipelineEngine, name, told("DeepSpeed", getattr(PipelineEngine, name)))


def sent(runs: Runs, name: str, rank: int, how: str) -> int:
    return runs.message(name, rank).count(f"sent by {how}")


def same(runs: Runs, one: str, other: str) -> None:
    for files in ("model*.safetensors", OPTIMIZER):
        pair = (tensors(runs.folder / name / "checkpoint-8", files) for name in (one, other))
        assert different(*pair) == []
    losses = [
        [entry[key] for entry in final_log(runs, name) for key in ("loss", "eval_loss") if key in entry]
        for name in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param(("parallel.pipeline=2", "train.precision=bf16"), 2, id="two"),
        pytest.param(("parallel.pipeline=2", "train.precision=fp32", "data.document_mask=true"), 2, id="documents"),
        pytest.param(
            ("parallel.pipeline=2", "parallel.tensor=2", "train.precision=bf16"), 4, id="tensor", marks=pytest.mark.slow
        ),
        pytest.param(("parallel.pipeline=3", "train.precision=bf16", *FOUR_MICRO_BATCHES), 3, id="three"),
        pytest.param(
            ("parallel.pipeline=4", "model.num_hidden_layers=4", "train.precision=bf16"), 4, id="four",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_steps_and_evaluations_are_the_same(runs, layout, world_size):
    name = "-".join(layout).replace("=", "-")
    settings = (*layout, "train.eval_strategy=steps", "train.eval_steps=4")
    run(runs, f"{name}-deepspeed", *settings, world_size=world_size)
    run(runs, f"{name}-copies", *settings, world_size=world_size, prepare=by_copies)
    same(runs, f"{name}-deepspeed", f"{name}-copies")
    for rank in range(world_size):
        assert sent(runs, f"{name}-copies", rank, "copies") > sent(runs, f"{name}-copies", rank, "DeepSpeed") > 0


def test_stages_whose_devices_are_strangers_send_by_deepspeed(runs):
    layout = ("parallel.pipeline=2", "train.precision=bf16")
    run(runs, "none", *layout)
    run(runs, "strangers", *layout, prepare=by_copies, strangers=(1,))
    same(runs, "none", "strangers")
    for rank in range(2):
        assert sent(runs, "strangers", rank, "copies") == 0
