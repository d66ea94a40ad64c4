"""Reading files that somebody handed in: plain ones, within limits, as strict JSON. Every fault is one sentence."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from helpers.errors import CourseError

KIB = 2**10


def refuse(reason: str) -> NoReturn:
    """Refuse what was handed in, for one reason."""
    raise CourseError(reason)


def check_entries(folder: Path, needed: set[str], ignored: set[str]) -> None:
    """Refuse a folder that is a link, lacks a name, or holds one that is unknown or a link."""
    if folder.is_symlink() or not folder.is_dir():
        refuse(f"{folder.name} is no folder")
    missing = set(needed)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                refuse(f"{entry.name!a} is a link: hand in the file itself")
            if entry.name not in needed | ignored:
                refuse(f"{entry.name!a} does not belong to a submission: take it out")
            if entry.name != "adapter" and not entry.is_file(follow_symlinks=False):
                refuse(f"{entry.name} is not a plain file")
            missing.discard(entry.name)
    if missing:
        refuse(f"{sorted(missing)[0]} is missing")


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most `limit` bytes; no link is followed, and no pipe is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        refuse(f"{path.name} cannot be read ({error.strerror})")
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse(f"{path.name} is not a plain file")
        if status.st_size > limit:
            refuse(f"{path.name} is larger than {limit // KIB} KiB")
        return file.read(limit)


def read_text(path: Path, limit: int) -> str:
    """The text of a plain file."""
    try:
        return read_plain(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        refuse(f"{path.name} is not UTF-8 text")


def read_values(path: Path, limit: int, most: int) -> list[dict[str, Any]]:
    """JSON objects that follow each other, one a line or over several lines; at most so many."""
    return list(parse_values(read_text(path, limit), path.name, most))


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The one JSON object of a file."""
    values = read_values(path, limit, 1)
    return values[0] if values else refuse(f"{path.name} is empty")


def parse_values(text: str, name: str, most: int) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text; refuses more than `most`, what is not an object, NaN, and half characters."""
    decoder = json.JSONDecoder(parse_constant=lambda constant: refuse(f"{name} holds {constant}, which is no number"))
    place, found = _skip(text, 0), 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            refuse(f"{name} is not JSON in entry {found + 1} ({type(error).__name__})")
        found += 1
        if not isinstance(value, dict):
            refuse(f"{name} holds something other than an object in entry {found}")
        if found > most:
            refuse(f"{name} holds more than {most} entries")
        yield value
        place = _skip(text, place)


def _skip(text: str, place: int) -> int:
    """The next place that is not white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def text_in(value: dict[str, Any], key: str, most: int, where: str) -> str:
    """A text of an object, of at most so many characters."""
    text = value.get(key)
    if not isinstance(text, str):
        refuse(f"{where} has no text {key!r}")
    if len(text) > most:
        refuse(f"{where} has {len(text)} characters of {key!r}, and {most} are allowed")
    return text
