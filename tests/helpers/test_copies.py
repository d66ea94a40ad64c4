"""Copies of checkpoints: complete or absent after a kill at any instant, compared by hash, two generations."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers.errors import CourseError
from helpers.profiles import ROOT
from helpers.training.checkpoints import find_damage, newest_checkpoint, read_state, save_checkpoint
from helpers.training.copies import back_up, drive_folder, kept, restore
from tests.support.training_worker import _kill_at_operation, quick_processes

STEPS = ["step-00000010", "step-00000020", "step-00000030", "step-00000040"]


def save(folder: Path, step: int, numbers: int = 100) -> Path:
    return save_checkpoint(folder, step, {"x": torch.full((numbers,), float(step))}, {"step": step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "drive" / "MyDrive" / "run"


@pytest.fixture
def copied(run, place):
    """A run of three checkpoints, of which two generations were copied; the machine is new."""
    for step in (10, 20, 30):
        save(run, step)
        back_up(run, place)
    shutil.rmtree(run)


# ---------------------------------------------------------------- copies


def test_the_newest_checkpoint_is_copied_byte_for_byte_and_two_generations_are_kept(run, place):
    for step, there in ((10, STEPS[:1]), (20, STEPS[:2]), (30, STEPS[1:3])):
        newest = save(run, step)
        assert back_up(run, place) == place / newest.name
        assert names(place) == there
        assert contents(place / newest.name) == contents(newest)


def test_what_is_copied_already_is_not_copied_again(run, place):
    copy = back_up(save(run, 10).parent, place)
    before = (copy / "manifest.json").stat().st_mtime_ns
    assert back_up(run, place) == copy and (copy / "manifest.json").stat().st_mtime_ns == before


def test_a_damaged_copy_is_replaced_by_a_sound_one(run, place):
    copy = back_up(save(run, 10).parent, place)
    (copy / "state.json").write_text("")
    assert find_damage(back_up(run, place)) is None and names(place) == STEPS[:1]


def test_the_last_sound_copy_is_never_given_up_for_a_damaged_one(run, place):
    for step in (10, 20):
        back_up(save(run, step).parent, place)
    (place / STEPS[1] / "tensors.safetensors").write_bytes(b"")
    save(run, 30)
    back_up(run, place)
    assert names(place) == [STEPS[0], STEPS[2]]


def test_a_run_without_checkpoints_has_nothing_to_copy(run, place):
    assert back_up(run, place) is None and not place.exists()


def test_checkpoints_that_go_while_they_are_copied_do_no_harm(run, place):
    stop = threading.Event()

    def train() -> None:
        step = 1
        while not stop.is_set():
            save_checkpoint(run, step := step + 1, {"x": torch.full((200_000,), float(step))}, {"step": step}, keep=1)

    save(run, 1)
    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        copies, end = set(), time.monotonic() + 60
        while len(copies) < 10 and time.monotonic() < end:
            copies.add(back_up(run, place))
    finally:
        stop.set()
        trainer.join()
    assert len(copies) == 10 and len(names(place)) == 2
    assert all(find_damage(path) is None for path in place.iterdir())


# ---------------------------------------------------------------- restoring


def test_a_new_machine_continues_from_the_newest_copy(run, place, copied, capsys):
    assert restore(run, place) == run / STEPS[2] == newest_checkpoint(run)
    assert capsys.readouterr().out == f"Continuing from {STEPS[2]}, brought back from {place}.\n"


def lose_the_tensors(checkpoint: Path) -> None:
    (checkpoint / "tensors.safetensors").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [lose_the_tensors, lose_the_manifest, cut_short, flip_a_bit])
def test_the_generation_before_is_used_where_the_newest_is_damaged_and_both_are_named(
    run, place, copied, capsys, damage
):
    damage(place / STEPS[2])
    assert restore(run, place) == run / STEPS[1]
    said = capsys.readouterr().out
    assert said.startswith(f"Continuing from {STEPS[1]}, brought back from {place}; damaged there: {STEPS[2]} (")
    assert names(run) == [STEPS[1]] and read_state(run / STEPS[1]) == {"step": 20}


def test_where_every_copy_is_damaged_one_sentence_names_them(run, place, copied):
    for checkpoint in place.iterdir():
        flip_a_bit(checkpoint)
    with pytest.raises(CourseError, match=rf"No usable copy is left in .*{STEPS[2]} \(.*{STEPS[1]} \(.*; delete that"):
        restore(run, place)
    assert not run.exists()


def test_the_local_run_goes_first_unless_the_copy_is_further(run, place, copied, capsys):
    save(run, 30)
    assert restore(run, place) == run / STEPS[2]
    assert capsys.readouterr().out == f"Continuing from {STEPS[2]} on this machine.\n"
    flip_a_bit(run / STEPS[2])  # then the same step is brought back whole
    assert restore(run, place) == run / STEPS[2] == newest_checkpoint(run)
    save(run, 40)
    assert restore(run, place) == run / STEPS[3]


def test_where_there_is_nothing_the_run_starts_anew(run, place, capsys):
    assert restore(run, place) is None
    assert capsys.readouterr().out == f"Nothing to continue from in {place}.\n"


# ---------------------------------------------------------------- kills


def die_at_every_operation(folder: Path, act: str) -> None:
    """Copy, or bring back, again and again, killed one file operation later each time, until one is through.

    Writes to `folder`/report.json what was there after each kill, and after trying again.
    """
    report, survived = [], False
    while not survived:
        run, place = folder / str(len(report)) / "run", folder / str(len(report)) / "place"
        for step in (10, 20, 30):
            save(run, step)
            if step < 30 or act == "restore":
                back_up(run, place)
        if act == "restore":
            shutil.rmtree(run)
            save(run, 10)
        child = os.fork()
        if child == 0:
            _kill_at_operation(len(report) + 1)
            back_up(run, place) if act == "back_up" else restore(run, place)
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        there = place if act == "back_up" else run
        newest = newest_checkpoint(there)
        assert not [path for path in there.glob("step-*") if find_damage(path)]
        leftovers = [path.name for path in there.glob(".partial-*")]
        again = back_up(run, place) if act == "back_up" else restore(run, place)
        report.append([newest.name, leftovers, again.name, names(there)])
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "before", "after"), [("back_up", STEPS[1], STEPS[1:3]), ("restore", STEPS[0], [STEPS[0], STEPS[2]])]
)
def test_a_kill_at_any_file_operation_leaves_what_was_there_or_the_new_one_too(tmp_path, act, before, after):
    process = quick_processes().Process(target=die_at_every_operation, args=(tmp_path, act))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    newest = [name for name, *_ in report]
    assert len(report) > 12 and any(leftovers for _, leftovers, *_ in report)  # it was killed in the middle of things
    assert newest == sorted(newest) and {*newest} == {before, STEPS[2]}
    assert all(again == STEPS[2] for *_, again, _ in report)
    # After a copy nothing else is there; in the run itself, leftovers go when it saves.
    assert all([name for name in there if act == "back_up" or name[0] != "."] == after for *_, there in report)


def test_a_kill_in_the_middle_of_a_large_file_leaves_the_copy_before_it(run, place):
    back_up(save(run, 10).parent, place)
    save(run, 20, numbers=16_000_000)  # 64 MB
    cut = 0
    for instant in range(12):
        child = os.fork()
        if child == 0:
            back_up(run, place)
            os._exit(0)
        time.sleep(0.004 * instant)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        staged = place / f".partial-{STEPS[1]}" / "tensors.safetensors"
        cut += staged.exists() and 0 < staged.stat().st_size < 64_000_000
        assert newest_checkpoint(place).name in STEPS[:2]
        if (place / STEPS[1]).exists():
            shutil.rmtree(place / STEPS[1])
    assert cut, "no copy was killed in the middle of the file"
    assert find_damage(back_up(run, place)) is None and names(place) == STEPS[:2]


def test_a_full_drive_is_one_sentence_and_leaves_the_copies_before(run, place, tmp_path):
    back_up(save(run, 10).parent, place)
    save(run, 20, numbers=100_000)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            back_up(run, place)
        except CourseError as error:
            (tmp_path / "said").write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"{STEPS[1]} could not be copied to {place} (File too large): see that it is mounted")
    assert names(place) == STEPS[:1] and find_damage(place / STEPS[0]) is None


# ---------------------------------------------------------------- a run with its copies


def wait_for(place: Path, step: int) -> None:
    """Wait until `place` has a checkpoint of that step or a later one."""
    end = time.monotonic() + 120
    while not [path for path in place.glob("step-*") if path.name >= f"step-{step:08d}"]:
        assert time.monotonic() < end, f"no checkpoint of step {step} came"
        time.sleep(0.01)


def test_checkpoints_are_copied_while_the_run_goes_on_and_once_more_at_its_end(run, place):
    with kept(run, place, every=0.01):
        save(run, 10)
        wait_for(place, 10)
        save(run, 20)
    assert names(place) == STEPS[:2]


def test_an_interrupted_run_is_copied_too(run, place):
    with pytest.raises(KeyboardInterrupt), kept(run, place, every=100):
        save(run, 10)
        raise KeyboardInterrupt
    assert names(place) == STEPS[:1]


def test_a_place_that_fails_is_reported_and_does_not_stop_the_run(run, place, capsys):
    place.parent.mkdir(parents=True)
    place.write_text("not a folder")
    done = False
    with pytest.raises(CourseError, match=f"{STEPS[1]} could not be copied"), kept(run, place, every=0.01):
        save(run, 10)
        time.sleep(0.3)
        save(run, 20)
        done = True
    assert done and capsys.readouterr().out.count(f"{STEPS[0]} could not be copied to {place}") == 1


def test_without_a_place_nothing_is_copied_and_nothing_said(run, capsys):
    before = threading.active_count()
    with kept(run, None):
        assert threading.active_count() == before
    assert capsys.readouterr().out == ""


def test_drive_is_for_colab_only():
    with pytest.raises(CourseError, match="Google Drive can only be mounted in Colab: give `kept` another folder"):
        drive_folder("my_run")


# ---------------------------------------------------------------- the resume cell


def resume_cell() -> str:
    """The cell in docs/colab.md that a student puts in the place of a call of `train`."""
    text = (ROOT / "docs" / "colab.md").read_text(encoding="utf-8")
    (cell,) = re.findall(r"```python\n(# Saves the run as it goes\..*?)```", text, re.DOTALL)
    return cell


NOTEBOOK = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
sys.path.insert(0, {root!r})
from helpers.training import TrainConfig, train
torch.set_num_threads(1)
ROOT = Path({machine!r})

class Model(torch.nn.Sequential):
    def forward(self, input_ids):
        return SimpleNamespace(logits=super().forward(input_ids))

class SlowList(list):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.02)
            yield batch

torch.manual_seed(0)
model = Model(torch.nn.Embedding(64, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 64))
batches = SlowList(dict(input_ids=torch.randint(0, 64, (4, 16))) for _ in range(7))
{cell}
Path({out!r}).write_text(json.dumps(history.losses))
"""
STAND_IN = """
from pathlib import Path
def mount(place):
    (Path(place) / "MyDrive").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def runtime(tmp_path):
    """Starts the resume cell on a named machine, whose disk nothing else sees; Drive is the same for all."""
    package = tmp_path / "stand_in" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "drive.py").write_text(STAND_IN)
    changes = {
        "keep_on_drive = False": "keep_on_drive = True",
        'drive_folder("my_run")': f'drive_folder("my_run", mount_point={str(tmp_path / "drive")!r})',
        " if keep_on_drive else None": " if keep_on_drive else None, every=0.05",
        "max_steps=2000": "max_steps=150",
        "checkpoint_every=100": "checkpoint_every=10, progress=False",
    }
    cell = resume_cell()
    for old, new in changes.items():
        assert cell.count(old) == 1
        cell = cell.replace(old, new)

    def start(machine: str) -> subprocess.Popen:
        code = NOTEBOOK.format(
            root=str(ROOT),
            machine=str(tmp_path / machine),
            cell=cell,
            out=str(tmp_path / f"{machine}.json"),
        )
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "stand_in"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.slow
def test_the_resume_cell_survives_killed_runtimes_with_the_losses_of_a_run_that_was_not_killed(runtime, tmp_path):
    place = tmp_path / "drive" / "MyDrive" / "llm-workbook" / "my_run"
    said = []
    for machine, step in (("first", 30), ("second", 80)):
        process = runtime(machine)
        wait_for(place, step)
        process.kill()
        said.append(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL and not (tmp_path / f"{machine}.json").exists()
        shutil.rmtree(tmp_path / machine)  # the machine is gone, its disk with it
    last = runtime("third")
    said.append(last.communicate(timeout=120)[0])
    shutil.rmtree(place)
    whole = runtime("whole")
    whole.communicate(timeout=120)
    assert last.returncode == whole.returncode == 0
    assert said[0].startswith("Nothing to continue from in ")
    assert all(text.startswith("Continuing from step-") for text in said[1:])
    losses = json.loads((tmp_path / "third.json").read_text())
    assert len(losses) == 150 and losses == json.loads((tmp_path / "whole.json").read_text())
