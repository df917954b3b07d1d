"""What two ranks tell each other about their memory, on the host: each rank is a thread, what is waited for is time."""

import os
import random
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from neox_hf.parallel import peer_memory
from neox_hf.parallel.peer_memory import ALIGNMENT, NO_MULTICAST, PeerMemory

SIZE, PLACES, TURNS = 2 * ALIGNMENT, 3, 60


class Device:
    """The memory of two ranks, and signals that are there or not. One that is given twice is an error."""

    def __init__(self):
        self.buffers = {}
        self.signals = set()
        self.changed = threading.Condition()

    def handle(self, rank, number):
        def put_signal(peer, channel, timeout_ms):
            assert timeout_ms == 20_000
            with self.changed:
                assert (peer, channel) not in self.signals
                self.signals.add((peer, channel))
                self.changed.notify_all()

        def wait_signal(peer, channel, timeout_ms):
            with self.changed:
                assert self.changed.wait_for(lambda: (rank, channel) in self.signals, timeout_ms / 1000)
                self.signals.remove((rank, channel))

        def get_buffer(peer, size, dtype):
            with self.changed:
                assert self.changed.wait_for(lambda: (peer, number) in self.buffers, 20)
            return self.buffers[peer, number]

        return SimpleNamespace(rank=rank, put_signal=put_signal, wait_signal=wait_signal, get_buffer=get_buffer)


@pytest.fixture
def make(monkeypatch):
    """A place of a rank, by number."""
    device, made = Device(), threading.local()
    monkeypatch.setenv(NO_MULTICAST, "1")  # both ranks are of one process here, and it has one environment

    def empty(size, dtype, device):
        return torch.zeros(size, dtype=dtype)

    def rendezvous(mine, group):
        assert os.environ[NO_MULTICAST] == "1"
        with device.changed:
            device.buffers[made.rank, made.number] = mine
            device.changed.notify_all()
        return device.handle(made.rank, made.number)

    def make(rank, number):
        made.rank, made.number = rank, number
        place = PeerMemory(SIZE, torch.device("cpu"))
        place.meet(None, number, timedelta(seconds=20))
        return place

    monkeypatch.setattr(peer_memory, "symmetric_memory", SimpleNamespace(empty=empty, rendezvous=rendezvous))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return make


def message(value):
    """Two tensors, of which the first leaves a gap behind it."""
    return torch.full((3, 5), value), torch.full((ALIGNMENT // 8,), value, dtype=torch.float64)


def test_nothing_is_overwritten_before_it_is_read(make):
    """Messages of two tensors, of a rank that is now ahead and now behind, all places in use at once."""
    wrong, failed = [], []

    def run(rank):
        try:
            delays = random.Random(rank)
            places = [make(rank, number) for number in range(PLACES)]
            for turn in range(TURNS):
                sent = [message(100.0 * turn + 10 * number + rank) for number in range(PLACES)]
                for place, tensors in zip(places, sent, strict=True):
                    place.exchange(*tensors)
                    time.sleep(delays.choice([0, 0, 0.002]))
                for number, (place, tensors) in enumerate(zip(places, sent, strict=True)):
                    pairs = place.summands(*tensors)
                    time.sleep(delays.choice([0, 0, 0.002]))
                    first = 100.0 * turn + 10 * number
                    alike = all((found == first + place).all() for pair in pairs for place, found in enumerate(pair))
                    place.release()
                    if not alike:
                        wrong.append((rank, turn, number))
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert failed == []
    assert wrong == []


@pytest.mark.parametrize("before", [None, "0"])
def test_multicast_is_as_it_was(before, monkeypatch):
    monkeypatch.delenv(NO_MULTICAST, raising=False)
    if before is not None:
        monkeypatch.setenv(NO_MULTICAST, before)
    with peer_memory._without_multicast():
        assert os.environ[NO_MULTICAST] == "1"
    assert os.environ.get(NO_MULTICAST) == before


class Driver:
    """CUDA's, of devices of which 0 and 1 are linked by NVLink."""

    def cuDeviceGet(self, handle, index):
        handle._obj.value = index + 10
        return 0

    def cuDeviceGetP2PAttribute(self, value, attribute, device, other):
        assert attribute == peer_memory.NATIVE_ATOMICS
        value._obj.value = sorted((device.value, other.value)) == [10, 11]
        return 101 if device.value == other.value else 0


@pytest.mark.parametrize(
    ("mine", "theirs", "near"),
    [
        (("here", 0), ("here", 1), True),
        (("here", 0), ("here", 2), False),
        (("here", 0), ("there", 1), False),
        (("here", 0), ("here", 7), False),
        (("here", 0), ("here", 0), False),
    ],
    ids=["NVLink", "PCI Express", "two hosts", "hidden from this process", "shared"],
)
def test_who_is_near(mine, theirs, near, monkeypatch):
    def all_gather_object(both, own, group):
        assert own == (mine[0], f"GPU-{mine[1]}")
        both[:] = own, (theirs[0], f"GPU-{theirs[1]}")

    monkeypatch.setattr(peer_memory.socket, "gethostname", lambda: mine[0])
    monkeypatch.setattr(peer_memory.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(peer_memory.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    properties = {torch.device("cuda", n): SimpleNamespace(uuid=f"GPU-{n}") for n in range(3)}
    properties |= {n: properties[torch.device("cuda", n)] for n in range(3)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    assert peer_memory.are_near(None, torch.device("cuda", mine[1])) is near


def test_without_a_driver_nobody_is_near(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(peer_memory.ctypes, "CDLL", missing)
    assert not peer_memory._has_native_atomics(0, 1)


@pytest.mark.parametrize(("size", "room"), [(2**20, 2**20), (2**20 + 1, 2**21), (2**21 - 16, 2**21)])
def test_room(size, room):
    assert peer_memory.room_for(size) == room
