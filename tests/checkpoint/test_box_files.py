"""Files of boxes: what their headers say, and headers that lie."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from neox_hf.checkpoint.box_files import BoxFiles, pack_boxes
from neox_hf.checkpoint.boxes import Box
from neox_hf.checkpoint.tensor_file import write_tensors
from neox_hf.errors import CheckpointError


def test_the_header_tells_the_geometry(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, *pack_boxes([Box("w", (2, 0), (8, 3), torch.ones(2, 3)), Box.whole("v", torch.ones(5))]))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"w[2:4,0:3]", "v"}
        assert json.loads(file.metadata()["boxes"])["w[2:4,0:3]"] == {"name": "w", "offsets": [2, 0], "shape": [8, 3]}
    (box,) = BoxFiles([path]).find("w")
    assert (box.extent, box.dtype, box.file) == ((2, 3), torch.float32, "x.safetensors")


def test_views_that_share_storage_are_saved(tmp_path):
    flat = torch.arange(12.0)
    path = tmp_path / "x.safetensors"
    write_tensors(path, *pack_boxes([Box.whole("a", flat[:6].view(2, 3)), Box.whole("b", flat[6:].view(3, 2).t())]))
    reader = BoxFiles([path])
    (b,) = reader.find("b")
    assert torch.equal(reader.read(b, (slice(0, 2), slice(0, 3))), flat[6:].view(3, 2).t())


def test_tensors_are_made_as_they_are_written(tmp_path):
    """One after the other: none before its turn, and none twice."""
    path, made = tmp_path / "x.safetensors", []

    def box(name, value):
        def make():
            made.append(name)
            return torch.full((2, 3), value)

        return Box(name, (0, 0), (2, 3), torch.empty(2, 3, device="meta"), make)

    tensors, metadata = pack_boxes([box("a", 1.0), Box.whole("b", torch.ones(5)), box("c", 3.0)])
    assert made == []
    write_tensors(path, tensors, metadata)
    assert made == ["a", "c"]
    reader = BoxFiles([path])
    (c,) = reader.find("c")
    assert torch.equal(reader.read(c, (slice(0, 2), slice(0, 3))), torch.full((2, 3), 3.0))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "says nothing about its boxes"),
        ({"format": "pt"}, "says nothing about its boxes"),
        ({"boxes": "{"}, "says nothing about its boxes"),
        ({"boxes": "{}"}, "describes other boxes than the file holds"),
        (
            {"boxes": json.dumps({"w": {"name": "w", "offsets": [3], "shape": [4]}})},
            r"does not lie in a tensor of shape \(4,\)",
        ),
        ({"boxes": json.dumps({"w": {"name": "w", "offsets": [-1], "shape": [4]}})}, "does not lie in a tensor"),
        ({"boxes": json.dumps({"w": {"name": "w", "offsets": [0, 0], "shape": [4, 4]}})}, "does not lie in a tensor"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        BoxFiles([path])


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a tensor")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors file"):
        BoxFiles([path])
