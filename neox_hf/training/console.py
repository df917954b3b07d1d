"""What a run says of itself on the terminal: the `neox_hf` logger, written to stderr."""

import logging
import os

HANDLER = "neox_hf console"


def launched_rank() -> int:
    """The rank that a launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def log_to_stderr(rank: int) -> None:
    """Write our own log to stderr: all of it from INFO up on rank 0, errors alone on the others.

    What the ranks have to say is nearly always the same, so one of them says it. A second call replaces the first.
    For scripts: a library's user keeps the logging that they have set up themselves.
    """
    logger = logging.getLogger("neox_hf")
    for handler in [handler for handler in logger.handlers if handler.get_name() == HANDLER]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.set_name(HANDLER)
    where = "" if rank == 0 else f" on rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s{where}: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False  # else a handler of the root logger, which some library may add, would repeat it
