"""The one thread that empties the queue: in order, patient with the network, and never in the way of the process."""

import logging
import shlex
import threading
import time

from neox_hf.checkpoint.hub.faults import PushFault, Refused, Rejected, Unreachable
from neox_hf.checkpoint.hub.queue import Entry, PushQueue
from neox_hf.checkpoint.hub.remote import HubRepository, prepare_client
from neox_hf.checkpoint.hub.report import PublishReport
from neox_hf.checkpoint.settings import HubSettings

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
LONGEST_ASKED_WAIT = 600.0


class PushWorker:
    """Pushes the entries of a queue until `finish`.

    An entry whose attempts are used up is set aside, so that it does not hold up the others, and tried once more after
    each push that worked and at the end. A refusal (no token, no permission) stops the thread; entries stay queued.
    """

    def __init__(self, queue: PushQueue, settings: HubSettings, repo_id: str | None = None) -> None:
        """repo_id: push there, whatever the entries say."""
        prepare_client(settings.timeout)
        self._queue = queue
        self._settings = settings
        self._repo_id = repo_id
        self._repositories: dict[str, HubRepository] = {}
        self._tries: dict[str, int] = {}
        self._rejected: set[str] = set()
        self._pushed: list[str] = []
        self._reasons: dict[str, str] = {}
        self._stopped_by: str | None = None
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Look at the queue; the first call starts the thread. Returns at once."""
        with self._work:
            self._work.notify_all()
            if self._thread is None:
                # A daemon: a process may end while an upload hangs.
                self._thread = threading.Thread(target=self._run, name="hub-publisher", daemon=True)
                self._thread.start()

    def finish(self, timeout: float | None) -> PublishReport:
        """Wait until the queue is empty or given up, at most `timeout` seconds (None: as long as the attempts take)."""
        with self._work:
            self._forgive()
            self._closing.set()
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive() and self._stopped_by is None:
                self._stopped_by = f"the upload had not ended when {timeout:g} s had passed"
        self._abandoned.set()
        with self._work:
            self._work.notify_all()
        return self._report()

    def _report(self) -> PublishReport:
        default = self._stopped_by or "it was not tried"
        pending = [(entry.revision, self._reasons.get(entry.name, default)) for entry in self._queue.entries()]
        output_dir = shlex.quote(str(self._queue.path.parent))
        return PublishReport(list(self._pushed), pending, f"python -m neox_hf.checkpoint.hub.push {output_dir}")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with self._queue.lock():
                    entry = self._next()  # another process may have pushed it meanwhile
                    fault = self._attempt(entry) if entry is not None else None
                if isinstance(fault, Refused) or (entry is not None and self._hopeless(entry, fault)):
                    self._stopped_by = str(fault)
                    return
                if isinstance(fault, Unreachable):
                    self._pause(entry, fault)
        except Exception as error:  # the thread's last word: it must not vanish without a reason
            logger.exception("publishing stopped; what is queued can be pushed later")
            self._stopped_by = f"publishing stopped by {type(error).__name__}: {error}"

    def _wait_for_work(self) -> bool:
        with self._work:
            while not self._abandoned.is_set():
                if self._next() is not None:
                    return True
                if self._closing.is_set():
                    return False
                self._work.wait()
        return False

    def _next(self) -> Entry | None:
        """The oldest entry that may still be tried."""
        for entry in self._queue.entries():
            if entry.name not in self._rejected and self._tries.get(entry.name, 0) < self._settings.attempts:
                return entry
        return None

    def _attempt(self, entry: Entry) -> PushFault | None:
        started = time.monotonic()
        try:
            self._push(entry)
        except PushFault as fault:
            with self._work:
                self._tries[entry.name] = self._tries.get(entry.name, 0) + 1
            self._reasons[entry.name] = str(fault)
            if isinstance(fault, Rejected):
                self._rejected.add(entry.name)
            logger.warning("revision %s was not pushed: %s", entry.revision, fault)
            return fault
        self._queue.remove(entry)
        self._pushed.append(entry.revision)
        with self._work:
            self._forgive()
        logger.info("revision %s was pushed in %.1f s", entry.revision, time.monotonic() - started)
        return None

    def _push(self, entry: Entry) -> None:
        try:
            destination = entry.destination()
        except ValueError as error:
            raise Rejected(str(error)) from error
        repo_id = self._repo_id or destination.repo_id
        if repo_id not in self._repositories:
            self._repositories[repo_id] = HubRepository(repo_id, destination.private)
        self._repositories[repo_id].push(entry.revision, entry.files, destination.title)

    def _forgive(self) -> None:
        """One more try for each entry that had been set aside."""
        last = self._settings.attempts - 1
        self._tries = {name: min(tries, last) for name, tries in self._tries.items()}

    def _hopeless(self, entry: Entry, fault: PushFault | None) -> bool:
        """At the end of a run, a server that failed every attempt at one entry is not asked for the others."""
        used_up = self._tries.get(entry.name, 0) >= self._settings.attempts
        return self._closing.is_set() and isinstance(fault, Unreachable) and used_up

    def _pause(self, entry: Entry, fault: Unreachable) -> None:
        """Wait before the next attempt. `finish` cuts a wait that is under way, once, to make its own attempts."""
        doubled = self._settings.retry_wait * 2 ** (self._tries[entry.name] - 1)
        seconds = max(min(doubled, LONGEST_WAIT), min(fault.wait, LONGEST_ASKED_WAIT))
        (self._abandoned if self._closing.is_set() else self._closing).wait(seconds)
