"""The instructor's secret: made once, published as a hash on the first day, and as it is on the last."""

import hashlib
import secrets
from pathlib import Path

from helpers.errors import CourseError
from helpers.files import write_atomically

SHORTEST = 20  # characters: a word could be guessed from its hash


def read_secret(path: Path) -> str:
    """The text of the file, without white space around it."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise CourseError(f"The secret {path} cannot be read: make one with commit, or give its file.") from None
    if len(secret) < SHORTEST:
        raise CourseError(
            f"The secret in {path} is shorter than {SHORTEST} characters and could be guessed: let commit make one."
        )
    return secret


def commit(path: Path) -> str:
    """The hash to be published; a secret is made where the file does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(32) + "\n")
        path.chmod(0o600)
    return hashlib.sha256(read_secret(path).encode()).hexdigest()
