"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_aside(path: Path, text: str) -> None:
    """Replace a whole file at once: after a full disk or a crash the old file is still there."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # process ids of other machines may be equal
    try:
        with aside.open("w", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
