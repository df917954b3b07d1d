"""YAML files and `key=value` overrides become one mapping; a mapping becomes a dataclass, strictly.

Knows nothing of models: the schema is whatever dataclass it is given.
"""

from neox_hf.config.build import build
from neox_hf.config.document import Document, Path
from neox_hf.config.files import read_file
from neox_hf.config.merge import merge
from neox_hf.config.overrides import read_override
from neox_hf.config.problems import Problem, nearest, report, shown
from neox_hf.config.yaml_text import dump_yaml, read_yaml

__all__ = [
    "Document",
    "Path",
    "Problem",
    "build",
    "dump_yaml",
    "merge",
    "nearest",
    "read_file",
    "read_override",
    "read_yaml",
    "report",
    "shown",
]
