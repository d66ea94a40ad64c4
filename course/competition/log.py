"""An append-only log: each line holds the hash of the line before, so that none can be changed or taken out later."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from helpers.errors import CourseError

START = "0" * 64


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries so far, oldest first. CourseError where the chain is broken."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The entries, and the hash of the last line."""
    previous, entries = START, []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            sound = entry["previous"] == previous
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise CourseError(
                f"{path.name} was changed in or before line {number}: restore it from a copy, or begin another log."
            )
        previous = _hash(line)
        entries.append(entry)
    return entries, previous


def append(path: Path, entries: list[dict[str, Any]]) -> str:
    """Add entries and return the hash of the last line, which is to be published."""
    _, previous = _read(path)  # never continue a broken chain
    with path.open("a", encoding="utf-8") as file:
        for entry in entries:
            line = json.dumps({**entry, "previous": previous}, ensure_ascii=True, sort_keys=True)
            file.write(line + "\n")
            previous = _hash(line)
        file.flush()
        os.fsync(file.fileno())
    return previous


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
