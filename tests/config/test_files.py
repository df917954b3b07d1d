"""Finding a file by the name on the command line, and what a file may not be."""

import pytest

from neox_hf.config.files import read_file
from neox_hf.errors import RecipeError


def refusal(name, directory=None):
    with pytest.raises(RecipeError) as error:
        read_file(str(name), directory)
    return str(error.value)


def test_values_and_places(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffmodel:\n  size: 1\n")
    document = read_file(str(path))
    assert document.values == {"model": {"size": 1}}
    assert document.origin(("model", "size")) == f"{path}:2"


def test_directory_and_a_name_without_suffix(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1")
    assert read_file("a.yaml", str(tmp_path)).values == {"x": 1}
    assert read_file("a", str(tmp_path)).values == {"x": 1}
    assert read_file(str(tmp_path / "a")).values == {"x": 1}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_says_nothing(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert read_file("a", str(tmp_path)).values == {}


def test_a_section_with_nothing_beneath_it_is_empty(tmp_path):
    (tmp_path / "a.yaml").write_text("hub:\n  # push: true\nmodel:\n  name:\n")
    assert read_file("a", str(tmp_path)).values == {"hub": {}, "model": {"name": None}}


def test_missing_file(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    assert refusal(tmp_path / "dmo.yaml") == f"{tmp_path}/dmo.yaml: no such file; did you mean {tmp_path}/demo.yaml?"
    assert refusal("quite_another", str(tmp_path)) == f"{tmp_path}/quite_another: no such file"
    assert refusal("a.yaml", "/no/folder") == "/no/folder/a.yaml: no such file"


def test_folder(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: is a folder; name a YAML file in it"


def test_not_utf8(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \xff")
    assert refusal(path) == f"{path}: byte 3 is not UTF-8; save the file as UTF-8"


def test_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1")

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", deny)  # a mode of 000 does not stop root
    assert refusal(path) == f"{path}: cannot be read: Permission denied"


def test_top_level_is_no_mapping(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n- x")
    assert refusal(path) == f'{path}: the top level must be a mapping of sections, found [1, "x"]'
