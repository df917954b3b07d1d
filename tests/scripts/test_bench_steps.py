"""The benchmark's turns of a training step: ours and peers, in this process and in their own."""

import dataclasses
import functools
import io
import json

import pytest
import torch

from scripts.bench import worker
from scripts.bench.peers import Peer, causal_without_mask, stock
from scripts.bench.rounds import Memory, Plan, measure_size, needed_gib, take_turns
from scripts.bench.sizes import MEASURED, SIZES
from scripts.bench.summary import ratios, summarise
from scripts.bench.turns import TurnClock, TurnLength, peak_gib
from scripts.bench.variants import parse_variant
from scripts.bench.worker import MARK, serve, turns_of
from tests.scripts.bench_cases import document, step

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
SHORT = TurnLength(0.0, 0.0, 1, 2)


@pytest.mark.parametrize("name", sorted({name for size in SIZES.values() for name in size.variants}))
def test_every_variant_of_a_size_is_one(name):
    assert parse_variant(name).name == name


def test_parts_of_a_variant():
    ours = parse_variant("ours-pure_bf16-selective-compiled")
    assert (ours.form, ours.precision, ours.switches) == ("ours", "pure_bf16", ("selective", "compiled"))
    assert [
        parse_variant(name).numeric_class for name in ("ours-bf16", "ours-pure_bf16", "tuned-amp", "eager-bf16")
    ] == [
        "amp",
        "bf16",
        "amp",
        "bf16",
    ]


@pytest.mark.parametrize("name", ["ours", "ours-bf17", "ours-bf16-fast", "eager", "eager-fp32", "tuned-amp-full", ""])
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="is unknown; it is ours-PRECISION"):
        parse_variant(name)


@pytest.mark.parametrize("variant", ["ours-bf16", "ours-pure_bf16-selective-torch"])
def test_a_turn_of_ours(variant):
    result = turns_of(TINY, parse_variant(variant), CPU).turn(SHORT)
    assert len(result["step_ms"]) == 2
    assert 0 < result["loss"] < 12


def test_ours_runs_what_its_name_says():
    for variant, wanted in (("ours-bf16", ("bf16", "none")), ("ours-pure_bf16-full", ("pure_bf16", "full"))):
        arguments = turns_of(TINY, parse_variant(variant), CPU)._arguments("nowhere")
        assert (arguments.precision, arguments.recompute) == wanted
        assert (arguments.max_grad_norm, arguments.adam_beta2, arguments.weight_decay) == (1.0, 0.95, 0.1)
        assert arguments.cuda_graphs == "auto"
    assert turns_of(TINY, parse_variant("ours-bf16-graphs"), CPU)._arguments("nowhere").cuda_graphs is True


@pytest.mark.parametrize("variant", ["eager-amp", "eager-bf16"])
def test_a_peer_learns_and_gives_its_memory_back(variant):
    turns = turns_of(TINY, parse_variant(variant), CPU)
    turns.peer.take_memory()
    losses = [float(turns.peer.step().detach()) for _ in range(3)]
    assert losses[-1] < losses[0]
    for _ in range(2):
        assert len(turns.turn(SHORT)["step_ms"]) == 2
        matrices = [p for p in turns.peer.model.parameters() if p.dim() > 1]
        assert all(p.untyped_storage().nbytes() == 0 and p.grad is None for p in matrices)


def test_precision_of_a_peer():
    for variant, dtype in (("eager-amp", torch.float32), ("eager-bf16", torch.bfloat16)):
        peer = Peer(TINY, parse_variant(variant), CPU)
        assert {p.dtype for p in peer.model.parameters()} == {dtype}


def test_without_a_mask_the_loss_is_the_same():
    peer = Peer(TINY, parse_variant("eager-bf16"), CPU)
    peer.model.float()
    own, loss = stock.create_causal_mask, peer._loss()
    with causal_without_mask():
        assert stock.create_causal_mask is not own
        torch.testing.assert_close(peer._loss(), loss)
    assert stock.create_causal_mask is own


def test_tuned_without_liger_says_so(monkeypatch, capsys):
    monkeypatch.setattr("scripts.bench.liger.find_spec", lambda name: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    serve(TINY, parse_variant("tuned-amp"), CPU)
    assert capsys.readouterr().out == MARK + '{"failed": "liger-kernel is not installed"}\n'


def test_a_worker_takes_turns_until_stdin_ends(monkeypatch, capsys):
    lengths = []

    class Turns:
        def turn(self, length):
            lengths.append(length)
            if len(lengths) == 3:
                raise torch.OutOfMemoryError("all of it")
            return {"loss": 1.0}

    monkeypatch.setattr(worker, "turns_of", lambda *_: Turns())
    request = json.dumps(dataclasses.asdict(SHORT)) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" + 2 * request))
    serve(TINY, parse_variant("ours-bf16"), CPU)
    answers = [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"ready": True}, {"loss": 1.0}, {"failed": "out of memory"}]
    assert lengths == [worker.PREPARING, SHORT, SHORT]


def test_a_clock_warms_up_and_then_counts(monkeypatch):
    monkeypatch.setattr("scripts.bench.timing.Laps.mark", lambda self: self._marks.append(0.0))
    now = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = TurnClock(TurnLength(warm_seconds=2, seconds=3, warm_steps=1, steps=2))
    assert [clock.is_over_after_step() for _ in range(6)] == [False, False, False, False, False, True]
    assert len(clock.result(1.0)["step_ms"]) == 3


def test_a_compiled_peer_compiles_once_for_all_its_turns(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    turns = turns_of(TINY, parse_variant("fixed-bf16"), CPU)
    turns.turn(SHORT)
    compiled = len(graphs)
    attention = [node for graph in graphs for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
    assert len(attention) == TINY.config().num_hidden_layers
    assert all(node.kwargs["is_causal"] and node.kwargs["attn_mask"] is None for node in attention)
    turns.turn(SHORT)
    assert len(graphs) == compiled


class Scripted:
    """A worker that answers what it was given."""

    def __init__(self, name, order, *answers):
        self.name, self.order, self.answers = name, order, iter(answers)

    def turn(self, length):
        self.order.append(self.name)
        return next(self.answers)


def test_rounds_go_to_and_fro_and_leave_out_what_failed():
    order, reports = [], []
    good = {"step_ms": [10.0], "peak_gib": 1.0, "loss": 1.0}
    workers = {
        "a": Scripted("a", order, good, good, good),
        "b": Scripted("b", order, good, {"failed": "out of memory"}),
        "c": Scripted("c", order, good, good, good),
    }
    figures = {name: {"turns": []} for name in workers}
    take_turns(workers, figures, Plan(SHORT, rounds=3), lambda found: reports.append(len(found["a"]["turns"])))
    assert "".join(order) == "abccbaac"
    assert figures["b"] == {"turns": [good], "failed": "out of memory"}
    assert len(reports) == len(order)


def test_no_turn_begins_without_time_for_it():
    order = []
    figures = {"a": {"turns": []}}
    take_turns({"a": Scripted("a", order)}, figures, Plan(SHORT, seconds=-1.0), lambda found: None)
    assert order == []


def test_memory_is_held_and_returned():
    memory = Memory(10.0)
    with memory.hold(4.0):
        assert memory.free == 6.0
    with memory.hold(400.0):
        assert memory.free == 0.0
    assert memory.free == 10.0


def test_ours_with_masters_needs_what_amp_does():
    size = SIZES["1.4b"]
    assert needed_gib(size, "ours-bf16") == needed_gib(size, "tuned-amp") == size.peak_gib["amp"]
    assert needed_gib(size, "ours-pure_bf16-selective") == needed_gib(size, "eager-bf16") == size.peak_gib["bf16"]


def test_processes_take_turns(monkeypatch):
    reports = []
    plan = Plan(TurnLength(0.0, 0.0, 1, 1), rounds=1, seconds=120, prepare_seconds=200)
    figures = measure_size(TINY, ["eager-bf16"], plan, reports.append)
    assert len(figures["eager-bf16"]["turns"]) == 1
    assert reports == [figures]


def test_a_process_that_dies_leaves_its_last_words(monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    figures = measure_size(TINY, ["eager-bf16"], Plan(SHORT, rounds=1, prepare_seconds=60), lambda found: None)
    assert figures["eager-bf16"]["failed"].startswith("ended: ")


def test_what_graphs_keep_counts(monkeypatch):
    gib = 2**30
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 9 * gib, "allocated_size": gib},
        {"segment_pool_id": (0, 1), "total_size": 5 * gib, "allocated_size": 2 * gib},
        {"segment_pool_id": (0, 2), "total_size": gib, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 20 * gib)
    assert peak_gib() == 24.0


def test_summary_of_turns():
    turns = [
        {"step_ms": [250.0, 240.0, 260.0], "peak_gib": 30.0, "loss": 9.0},
        {"step_ms": [244.0], "peak_gib": 31.0, "loss": 8.0},
    ]
    figures = {"ours-bf16": {"turns": turns, "prepare_seconds": 5.0}, "tuned-amp": {"turns": []}}
    found = summarise(SIZES["1.4b"], figures, 675.0)
    ours = found["ours-bf16"]
    assert (ours["ms"], ours["turn_ms"], ours["steps"], ours["peak_gib"]) == (247.0, [244.0, 250.0], 4, 31.0)
    assert ours["tokens_s"] == pytest.approx(16384 / 0.247)
    # 6 (N - V H) + 12 L H S for each token: 9.087e9.
    assert ours["tflops"] == pytest.approx(16384 / 0.247 * 9.087e9 / 1e12, rel=2e-3)
    assert ours["mfu"] == pytest.approx(ours["tflops"] / 675)
    assert found["tuned-amp"] == {"failed": "no turn within the time"}
    assert "mfu" not in summarise(SIZES["1.4b"], figures, None)["ours-bf16"]


def test_ours_stands_beside_peers_of_its_class():
    variants = document()["steps"]["1.4b"]
    assert ratios("ours-bf16", variants) == {"eager": pytest.approx(66 / 48), "tuned": pytest.approx(66 / 60)}
    assert ratios("ours-pure_bf16", variants) == {"eager": pytest.approx(68 / 53)}
    assert ratios("eager-amp", variants) == {}
    assert ratios("ours-bf16", {"ours-bf16": {"failed": "so"}, "eager-amp": step(1.0)}) == {}


def test_sizes_are_the_ones_that_were_promised():
    assert MEASURED == ("160m", "410m", "1.4b", "6.9b")
    assert [SIZES[name].tokens for name in MEASURED] == [65536, 32768, 16384, 8192]
    for size in SIZES.values():
        assert set(size.owed) <= set(size.variants)
