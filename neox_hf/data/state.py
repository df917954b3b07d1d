"""The data position of a run as small JSON: counted in samples, with one cursor for each lane, never tokens.

    {"format": 1, "next_sample": j, "taken": 128, "ranks": [0], "data_size": 2,
     "cursors": [[source, stream, epoch, turn, position, offset], ...], "fingerprint": {...}}

A state of one rank knows that rank's streams; `merge_states` joins the states of all ranks into one of the whole run,
which any data size can continue from.
"""

from collections.abc import Mapping, Sequence

from neox_hf.data.assignment import Cursor
from neox_hf.data.differences import differences
from neox_hf.data.stream import Lane, Position
from neox_hf.errors import DataError

FORMAT = 1


def rank_state(position: Position, taken: int, rank: int, data_size: int, fingerprint: Mapping[str, object]) -> dict:
    """The state of one rank. `taken`: samples since this process began, by which ranks are known to be in step."""
    return {
        "format": FORMAT,
        "next_sample": position.next_sample,
        "taken": taken,
        "ranks": [rank],
        "data_size": data_size,
        "cursors": [[*lane, *cursor] for lane, cursor in sorted(position.cursors.items())],
        "fingerprint": dict(fingerprint),
    }


def merge_states(states: Sequence[Mapping]) -> dict:
    """The states of all data ranks, taken after the same number of samples, as one state of the whole run.

    Raises DataError when they are not of one moment of one run.
    """
    if not states:
        raise DataError("no data states to merge")
    size = states[0]["data_size"]
    for state in states:
        refuse_other_fingerprint(state["fingerprint"], states[0]["fingerprint"], "the state of another rank")
    ranks = sorted(rank for state in states for rank in state["ranks"])
    if ranks != list(range(size)):
        raise DataError(f"wanted one data state of each of {size} data ranks, found those of ranks {ranks}")
    # The next samples of the ranks are d consecutive numbers: the run's next sample is the least of them.
    following = sorted(state["next_sample"] for state in states)
    taken = sorted({state["taken"] for state in states})
    if len(taken) > 1 or (len(states) > 1 and following != list(range(following[0], following[0] + size))):
        raise DataError(
            f"the data states are of different moments: the next samples of the ranks are {following}, "
            f"after {' or '.join(map(str, taken))} sample(s) on each rank"
        )
    return {
        **states[0],
        "next_sample": following[0],
        "ranks": ranks,
        "cursors": sorted((cursor for state in states for cursor in state["cursors"]), key=lambda cursor: cursor[:2]),
    }


def restored_position(state: Mapping, fingerprint: Mapping[str, object], rank: int, data_size: int) -> Position:
    """Where a rank of any data size goes on from a state of the whole run, or from the state of the same rank.

    Raises DataError for a state of other data, and for the state of one rank in a run of another size.
    """
    if state.get("format") != FORMAT:
        raise DataError(f"the data state has format {state.get('format')}, this version reads {FORMAT}")
    refuse_other_fingerprint(state["fingerprint"], fingerprint, "this run")
    if state["ranks"] not in ([rank], list(range(state["data_size"]))) or (
        len(state["ranks"]) < state["data_size"] and state["data_size"] != data_size
    ):
        raise DataError(
            f"the data state is of rank(s) {state['ranks']} of {state['data_size']}, this is rank {rank} of "
            f"{data_size}; merge the states of all ranks first (merge_states)"
        )
    following = state["next_sample"] + (rank - state["next_sample"]) % data_size
    cursors: dict[Lane, Cursor] = {
        (source, stream): Cursor(*cursor) for source, stream, *cursor in state["cursors"] if stream % data_size == rank
    }
    return Position(following, cursors)


def refuse_other_fingerprint(found: Mapping[str, object], wanted: Mapping[str, object], whose: str) -> None:
    """Raises DataError that names each part that differs, and how."""
    if differing := differences(found, "the state", wanted, whose):
        raise DataError(
            "the data state belongs to another token sequence; restore what it was made with, or start a new run. "
            + differing
        )
