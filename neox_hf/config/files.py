"""Finding and reading the YAML files that a command line names."""

from pathlib import Path as FilePath

from neox_hf.config.document import Document
from neox_hf.config.problems import nearest, shown
from neox_hf.config.yaml_text import read_yaml
from neox_hf.errors import RecipeError


def locate(name: str, directory: str | None = None) -> FilePath:
    """The file called `name`, looked for in `directory` when one is given; the suffix `.yaml` may be left out.

    Raises:
        RecipeError: there is no such file, or it is a folder.
    """
    path = FilePath(directory or "", name).expanduser()
    if not path.exists() and not path.suffix and path.with_suffix(".yaml").is_file():
        return path.with_suffix(".yaml")
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; name a YAML file in it")
    if not path.is_file():
        beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, sorted(beside))
        raise RecipeError(f"{path}: no such file" + (f"; did you mean {path.parent / close}?" if close else ""))
    return path


def read_file(name: str, directory: str | None = None) -> Document:
    """One YAML file as a document. An empty file, and a section with nothing beneath it, say nothing.

    Raises:
        RecipeError: the file cannot be found or read, or its top level is not a mapping.
    """
    path = locate(name, directory)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    values, origins = read_yaml(text, lambda line: f"{path}:{line}")
    if values is None:
        return Document()
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: the top level must be a mapping of sections, found {shown(values)}")
    return Document({key: {} if value is None else value for key, value in values.items()}, origins)
