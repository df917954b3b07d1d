"""Push what a run could not: `python -m neox_hf.checkpoint.hub.push OUTPUT_DIR [--repo-id owner/name]`.

Exit codes: 0 everything is on the Hub, 1 something is still queued, 2 a wrong argument.
"""

import argparse
from pathlib import Path

from neox_hf.checkpoint.hub.queue import PushQueue
from neox_hf.checkpoint.hub.worker import PushWorker
from neox_hf.checkpoint.settings import HubSettings


def main(arguments: list[str] | None = None) -> int:
    """Push the queue of one output directory, print the outcome, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m neox_hf.checkpoint.hub.push", description="Push what a run could not."
    )
    parser.add_argument("output_dir", type=Path, help="the run's output_dir")
    parser.add_argument("--repo-id", help="push to this repository instead of the one the run named")
    parser.add_argument("--attempts", type=int, default=HubSettings.attempts, help="tries at each revision")
    options = parser.parse_args(arguments)
    if not options.output_dir.is_dir():
        parser.error(f"{options.output_dir} is not a folder; name the output_dir of a run")
    try:
        settings = HubSettings(repo_id=options.repo_id, attempts=options.attempts)
    except ValueError as error:
        parser.error(str(error))
    worker = PushWorker(PushQueue(options.output_dir), settings, repo_id=options.repo_id)
    worker.wake()
    outcome = worker.finish(None)
    print(outcome)
    return 1 if outcome.pending else 0


if __name__ == "__main__":
    raise SystemExit(main())
