"""Copies of a run's checkpoints that outlive the machine: in a folder elsewhere, such as a mounted Google Drive.

    with kept("build/my_run", drive_folder("my_run")):
        history = train(model, batches, config, resume=True)

The run saves to the local disk, which is quick and does not lose writes. Meanwhile the newest checkpoint is copied to
the other folder: staged, compared with the SHA-256 of every file in its manifest, and renamed. Two complete
generations are kept there, because a Drive may lose what it had accepted when the machine goes away. On a new machine
the newest copy that agrees with its manifest is brought back first.

For runs of one process. This module knows the files of `helpers.training.checkpoints`, and nothing of what is in them.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.errors import CourseError
from helpers.training.checkpoints import MANIFEST, find_damage

GENERATIONS = 2
PARTIAL = ".partial-"


def drive_folder(name: str, mount_point: Path | str = "/content/drive") -> Path:
    """Mount Google Drive and return the folder of the run `name` in it; in Colab only, and Colab asks for access."""
    try:
        from google.colab import drive
    except ImportError:
        raise CourseError("Google Drive can only be mounted in Colab: give `kept` another folder, or None.") from None
    drive.mount(str(mount_point))
    return Path(mount_point) / "MyDrive" / "llm-workbook" / name


@contextmanager
def kept(folder: Path | str, place: Path | str | None, every: float = 30.0) -> Iterator[None]:
    """Bring the run in `folder` back from `place` if it is further there, and copy its checkpoints as they come.

    Looks for a new checkpoint every `every` seconds and once more at the end. A copy that fails is reported and tried
    again, and does not stop the run; `CourseError` at the end if the last one failed. `place=None` does nothing.
    """
    if place is None:
        yield
        return
    folder, place = Path(folder), Path(place)
    restore(folder, place)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, place, every, stop), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:  # an interrupted run is kept too, and its own error is the one to be seen
        stop.set()
        watcher.join()
        with suppress(CourseError):
            back_up(folder, place)
        raise
    stop.set()
    watcher.join()
    back_up(folder, place)


def back_up(folder: Path, place: Path) -> Path | None:
    """Copy the newest checkpoint of `folder` to `place` and return the copy; None if there is none.

    Afterwards `place` holds this copy and the newest complete one before it. `CourseError` if it cannot be written;
    what `place` held before is then intact.
    """
    while (newest := max(folder.glob("step-*"), default=None)) is not None:
        copy = place / newest.name
        try:
            if not _is_copy(copy, newest):
                _copy(newest, copy)
            _remove_all_but(_complete_before(copy)[: GENERATIONS - 1], copy)
            return copy
        except OSError as error:
            if not newest.exists():  # the run has saved newer ones since, and removed this one
                continue
            raise CourseError(
                f"{newest.name} could not be copied to {place} ({error.strerror or error}): see that it is mounted "
                f"and has room for {GENERATIONS + 1} checkpoints; the run itself is safe in {folder}."
            ) from error
    return None


def restore(folder: Path, place: Path) -> Path | None:
    """Bring the newest complete checkpoint of `place` to `folder`, unless one there is as far, and say which it was.

    Copies that do not agree with their manifest are named and passed over. Returns the checkpoint that the run will
    continue from; None if there is none. `CourseError` if it cannot be copied, or if all copies are damaged.
    """
    here = next((path for path in _newest_first(folder) if find_damage(path) is None), None)
    damaged = []
    for path in _newest_first(place):
        if here is not None and here.name >= path.name:
            break
        if damage := find_damage(path):
            damaged.append(f"{path.name} ({damage})")
            continue
        try:
            _copy(path, folder / path.name)
        except OSError as error:
            raise CourseError(
                f"{path} could not be brought back to {folder} ({error.strerror or error}): make room and try again."
            ) from error
        said = f"; damaged there: {', '.join(damaged)}" if damaged else ""
        print(f"Continuing from {path.name}, brought back from {place}{said}.")
        return folder / path.name
    if here is None and damaged:
        raise CourseError(
            f"No usable copy is left in {place}, damaged: {', '.join(damaged)}; delete that folder to start anew."
        )
    print(f"Continuing from {here.name} on this machine." if here else f"Nothing to continue from in {place}.")
    return here


def _watch(folder: Path, place: Path, every: float, stop: threading.Event) -> None:
    """Copy each new checkpoint until `stop` is set; what goes wrong is printed once, and tried again."""
    copied = reported = None
    while not stop.wait(every):
        newest = max(folder.glob("step-*"), default=None)
        if newest == copied:  # to compare the hashes again would read the whole copy
            continue
        try:
            back_up(folder, place)
            copied = newest
        except CourseError as error:
            if str(error) != reported:
                print(reported := str(error))


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _is_copy(copy: Path, original: Path) -> bool:
    """Whether `copy` is complete and of the same content, and not of another run's same step."""
    try:
        return (copy / MANIFEST).read_bytes() == (original / MANIFEST).read_bytes() and find_damage(copy) is None
    except FileNotFoundError:
        return False


def _copy(source: Path, target: Path) -> None:
    """Copy a checkpoint so that `target` is there in full or not at all."""
    partial = target.with_name(PARTIAL + target.name)
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        for file in sorted(source.iterdir(), key=lambda file: file.name == MANIFEST):  # the manifest last
            with file.open("rb") as stream, (partial / file.name).open("wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        if damage := find_damage(partial):
            raise OSError(f"the copy differs from its manifest: {damage}")
        _remove(target)
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _complete_before(newest: Path) -> list[Path]:
    """Complete checkpoints of earlier steps, newest first."""
    return [path for path in _newest_first(newest.parent) if path.name < newest.name and find_damage(path) is None]


def _remove_all_but(kept: list[Path], newest: Path) -> None:
    for path in [*newest.parent.glob("step-*"), *newest.parent.glob(f"{PARTIAL}*")]:
        if path not in (*kept, newest):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, so that a kill in the middle leaves nothing that looks like a damaged one."""
    if not path.exists():
        return
    if not path.name.startswith(PARTIAL):
        removed = path.with_name(f"{PARTIAL}removed-{path.name}")
        shutil.rmtree(removed, ignore_errors=True)
        path = path.rename(removed)
    for file in path.iterdir():
        file.open("wb").close()  # what is deleted on a Drive goes to its bin, where it still takes up its room
    shutil.rmtree(path)
