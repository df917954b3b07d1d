"""A thread that runs ahead: order, errors in their turn, and an end whatever the source is doing."""

import threading
from itertools import count, islice

import pytest

from neox_hf.data.prefetch import Prefetch


def nothing() -> None:
    pass


def test_order_is_kept_and_the_end_is_seen():
    assert list(Prefetch(iter(range(100)), depth=3)) == list(range(100))


def test_no_more_than_the_depth_is_made_ahead():
    made = []
    source = (made.append(number) or number for number in count())
    prefetch = Prefetch(source, depth=3)
    assert list(islice(prefetch, 5)) == [0, 1, 2, 3, 4]
    prefetch.close(nothing)
    assert len(made) <= 5 + 3 + 2  # taken, waiting in the queue, and in the hands of reader and thread


def test_an_error_comes_after_the_items_before_it():
    def source():
        yield 1
        raise KeyError("the source broke")

    items = iter(Prefetch(source(), depth=3))
    assert next(items) == 1
    with pytest.raises(KeyError, match="the source broke"):
        next(items)


def test_close_unblocks_a_source_that_waits():
    gate = threading.Event()

    def source():
        gate.wait()
        yield 1

    prefetch = Prefetch(source(), depth=1)
    prefetch.close(unblock=gate.set)
    assert list(prefetch) == []
