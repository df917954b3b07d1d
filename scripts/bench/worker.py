"""One variant in a process of its own, which compiles once and then takes its turns when told.

    python -m scripts.bench.worker SIZE VARIANT

The first line on stdin says that there is room to get ready; each further one is a `TurnLength` in JSON. Each answer is
one line on stdout behind MARK.
"""

import gc
import json
import sys
from typing import Any

import torch
import transformers

from scripts.bench.liger import NotInstalled
from scripts.bench.peers import Peer
from scripts.bench.sizes import SIZES, Size
from scripts.bench.steps import Ours
from scripts.bench.turns import PREPARING, TurnClock, TurnLength
from scripts.bench.variants import Variant, parse_variant

MARK = "bench-result "


class PeerTurns:
    """A peer's turns; between them it holds no memory but its compiled code."""

    def __init__(self, size: Size, variant: Variant, device: torch.device) -> None:
        self.peer = Peer(size, variant, device)

    def turn(self, length: TurnLength) -> dict[str, Any]:
        clock, peer = TurnClock(length), self.peer
        peer.take_memory()
        try:
            loss = peer.step()
            while not clock.is_over_after_step():
                loss = peer.step()
            return clock.result(float(loss.detach()))
        finally:
            loss = None
            peer.give_memory()
            gc.collect()
            if peer.device.type == "cuda":
                torch.cuda.empty_cache()


def turns_of(size: Size, variant: Variant, device: torch.device) -> Ours | PeerTurns:
    return (Ours if variant.is_ours else PeerTurns)(size, variant, device)


def answer(**values: Any) -> None:
    print(MARK + json.dumps(values), flush=True)


def serve(size: Size, variant: Variant, device: torch.device) -> None:
    """Prepare when told, say so, and take turns until stdin ends."""
    if not sys.stdin.readline():
        return
    try:
        turns = turns_of(size, variant, device)
        turns.turn(PREPARING)
    except (NotInstalled, torch.OutOfMemoryError) as problem:
        answer(failed=f"{problem}".split("\n")[0][:200])
        return
    answer(ready=True)
    for line in sys.stdin:
        try:
            answer(**turns.turn(TurnLength(**json.loads(line))))
        except torch.OutOfMemoryError:
            answer(failed="out of memory")


def main() -> None:
    name, variant = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    serve(SIZES[name], parse_variant(variant), torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
