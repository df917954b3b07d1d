"""Files that remember, for devices of one name, what was measured on one of them.

They lie in $NEOX_HF_CACHE, else ~/.cache/neox_hf, a folder for each kind of thing.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def cache_path(folder: str, device_name: str) -> Path:
    """The file in `folder` of the device of that name, which may not exist."""
    cache = os.environ.get("NEOX_HF_CACHE") or Path.home() / ".cache" / "neox_hf"
    return Path(cache).expanduser() / folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', device_name)}.json"


def replace_whole(path: Path, document: dict[str, Any]) -> None:
    """Replace the file as a whole: who reads it meanwhile sees the one before.

    Raises:
        OSError: it cannot be written; the one before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            json.dump(document, file, indent=1)
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
