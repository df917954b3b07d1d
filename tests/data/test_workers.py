"""Loader processes end when they should, and say what went wrong."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from itertools import islice

import pytest

from neox_hf.data import StreamLoader
from neox_hf.errors import DataError
from tests.data.naive import make_texts, settings_for, write_jsonl


@pytest.fixture
def settings(tmp_path):
    return settings_for(write_jsonl(tmp_path / "a.jsonl", make_texts(40)), streams=4)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def started(loader):
    batches = iter(loader)
    next(batches)
    return batches, [process.pid for process in loader._read_ahead.pool._processes]


def test_close_ends_the_processes(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches, pids = started(loader)
    assert all(map(is_alive, pids))
    loader.close()
    loader.close()
    assert not any(map(is_alive, pids))
    del batches


def test_close_does_not_wait_for_a_process_that_does_not_answer(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=1)
    batches, pids = started(loader)
    os.kill(pids[0], signal.SIGSTOP)
    loader.close()
    assert not is_alive(pids[0])
    del batches


def test_workers_survive_the_signals_of_a_scheduler(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches, pids = started(loader)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGUSR1)
    for _ in islice(batches, 50):
        pass
    assert all(map(is_alive, pids))
    loader.close()


def test_a_closed_loader_gives_an_old_iterator_nothing_more(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches, _ = started(loader)
    loader.close()
    assert list(batches) == []


def start_and_forget(loader):
    loader.kept = started(loader)  # a cycle: nothing collects it before the interpreter ends
    gc.disable()


def test_a_process_that_forgets_to_close_ends(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    child = multiprocessing.get_context("fork").Process(target=start_and_forget, args=(loader,))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_dropping_the_iterator_ends_the_processes(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches, pids = started(loader)
    del batches
    gc.collect()
    assert not any(map(is_alive, pids))


def test_an_old_iterator_that_goes_late_ends_nothing_of_the_new(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    old, old_pids = started(loader)
    new, new_pids = started(loader)
    assert not any(map(is_alive, old_pids))
    del old
    gc.collect()
    assert all(map(is_alive, new_pids))
    assert len(list(islice(new, 20))) == 20
    loader.close()


def test_a_bad_row_in_a_worker_is_the_same_error(tmp_path, stream_over):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    with path.open("a") as file:
        file.write("{broken\n")
    loader = StreamLoader(stream_over(settings_for(path)), 2, workers=2)
    with pytest.raises(DataError, match=r"a.jsonl:41: broken_json: "):
        for _ in islice(loader, 10_000):
            pass


def test_bad_rows_of_workers_are_counted(tmp_path, stream_over):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 40, "", "y" * 40, "", "z" * 40, ""])
    (tmp_path / "empty.jsonl").touch()
    loader = StreamLoader(stream_over(settings_for(tmp_path, bad_rows="skip")), 2, workers=2)
    for _ in islice(loader, 20):
        pass
    assert path.exists()
    assert loader.bad_rows == {"empty_text": 3, "empty_file": 1}


def test_bad_rows_may_be_summed_while_workers_report(tmp_path, stream_over):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 40, "", "y" * 40, "", "z" * 40, ""])
    loader = StreamLoader(stream_over(settings_for(tmp_path, bad_rows="skip")), 2, workers=2)
    counts = iter(loader._worker_bad_rows.values())
    assert next(counts) == {}
    for _ in islice(loader, 20):
        pass
    assert len(list(counts)) == 1  # a dict that had grown meanwhile would raise


def test_a_killed_worker_is_an_error_and_no_hang(stream_over, settings):
    loader = StreamLoader(stream_over(settings), 2, workers=2)
    batches, pids = started(loader)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(DataError, match=r"loader process 1 died with exit code -9"):
        for _ in islice(batches, 100_000):
            pass


def test_workers_end_when_their_parent_is_killed(stream_over, settings, tmp_path):
    told = tmp_path / "pids"
    child = os.fork()
    if child == 0:
        _, pids = started(StreamLoader(stream_over(settings), 2, workers=3))
        told.with_suffix(".partial").write_text(" ".join(map(str, pids)))
        told.with_suffix(".partial").rename(told)
        threading.Event().wait()
    while not told.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pids = list(map(int, told.read_text().split()))
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    """Alive, and not a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
