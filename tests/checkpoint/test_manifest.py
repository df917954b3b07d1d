"""The manifest's text guards itself."""

import json

import pytest

from neox_hf.checkpoint import FileRecord, Manifest
from neox_hf.errors import CheckpointError

MANIFEST = Manifest(
    step=7,
    world_size=2,
    metadata={"consumed_samples": 56, "loss": 2.25},
    versions={"torch": "2.13.0"},
    files=(FileRecord("a.json", 2, "00"), FileRecord("state/b.safetensors", 9, "ff")),
)


def test_it_comes_back_equal():
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.paths() == {"a.json", "state/b.safetensors"}


def test_every_flipped_byte_is_seen():
    text = MANIFEST.to_bytes()
    for place in range(len(text)):
        flipped = bytes([*text[:place], text[place] ^ 1, *text[place + 1 :]])
        with pytest.raises(CheckpointError):
            Manifest.from_bytes(flipped)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that are not JSON"),
        (b"\xff\xfe", "2 bytes that are not JSON"),
        (MANIFEST.to_bytes()[:50], "50 bytes that are not JSON"),
        (b"[]", "no sha256 of its own"),
        (b"{}", "no sha256 of its own"),
        (MANIFEST.to_bytes().replace(b'"step": 7', b'"step": 8'), "its content has sha256 .* it was written with"),
        (MANIFEST.to_bytes() + b"\n", "its content has sha256"),
        (Manifest(step=1, world_size=1, version=2).to_bytes(), "its version is 2; this neox_hf reads version 1"),
    ],
)
def test_what_is_wrong_is_said(data, message):
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_bytes(data)


def test_fields_of_another_writer_are_refused(monkeypatch):
    monkeypatch.setattr("neox_hf.checkpoint.manifest.asdict", lambda manifest: {"version": 1, "files": [], "extra": 0})
    text = MANIFEST.to_bytes()
    assert json.loads(text)["extra"] == 0
    with pytest.raises(CheckpointError, match="its fields are not those of version 1"):
        Manifest.from_bytes(text)
