"""Writing: the old file or folder, or the new one, whole, also when the writer fails or is killed."""

import os
import signal
from pathlib import Path

import pytest

from helpers import files
from helpers.files import replacing_folder, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    (tmp_path / "report.md").write_text("old")
    return tmp_path / "report.md"


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    return tmp_path / "model"


def test_a_file_is_made_or_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    for text in ("one", "two 島\n"):
        write_atomically(tmp_path / "report.md", text)
        assert (tmp_path / "report.md").read_bytes() == text.encode() and names(tmp_path) == ["report.md"]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    old_file: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(old_file, "new")
    assert old_file.read_text() == "old" and names(old_file.parent) == ["report.md"]


def test_a_kill_before_the_file_is_replaced_leaves_the_old_one(old_file: Path) -> None:
    child = os.fork()
    if child == 0:
        files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(old_file, "new")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert old_file.read_text() == "old"


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "build" / "model") as folder:
        (folder / "new").write_text("new")
        assert not (tmp_path / "build" / "model").exists()
    assert names(tmp_path / "build") == ["model"] and names(tmp_path / "build" / "model") == ["new"]


def test_a_folder_takes_the_place_of_the_older_one_when_the_block_ends(old_folder: Path) -> None:
    with replacing_folder(old_folder) as folder:
        (folder / "new").write_text("new")
        assert names(old_folder) == ["old"]
    assert names(old_folder) == ["new"] and names(old_folder.parent) == ["model"]


def test_a_block_that_raises_leaves_the_older_folder(old_folder: Path) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), replacing_folder(old_folder) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError("on purpose")
    assert names(old_folder) == ["old"] and names(old_folder.parent) == ["model"]


def test_what_a_killed_writer_left_beside_it_is_not_taken_over(old_folder: Path) -> None:
    left = old_folder.with_name(".model.partial")
    left.mkdir()
    (left / "half").write_text("")
    with replacing_folder(old_folder) as folder:
        (folder / "new").write_text("new")
    assert names(old_folder) == ["new"] and not left.exists()
