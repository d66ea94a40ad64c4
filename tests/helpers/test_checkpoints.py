"""Checkpoints: whole or absent after a kill at any file operation, damage is found, a full disk does no harm."""

import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from helpers.errors import CourseError
from helpers.training.checkpoints import (
    find_damage,
    load_tensors,
    newest_checkpoint,
    read_state,
    save_checkpoint,
    stored_tensors,
)
from tests.support.training_worker import die_at_every_operation, quick_processes

TENSORS = {
    "weights": torch.arange(3000.0).view(30, 100),
    "scalar": torch.tensor(7.0, dtype=torch.float64),
    "bytes": torch.arange(200, dtype=torch.uint8),
    "half": torch.full((3,), 0.1, dtype=torch.bfloat16),
}


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints, whose states are their steps."""
    for step in (10, 20, 30):
        tensors = {name: tensor.clone() + step for name, tensor in TENSORS.items()}
        save_checkpoint(tmp_path / "run", step, tensors, {"step": step}, keep=3)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_bit_for_bit(folder):
    path = newest_checkpoint(folder)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_tensors(path, tensors)
    assert read_state(path) == {"step": 30}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name] + 30)
    assert stored_tensors(path)["weights"] == ((30, 100), torch.float32)
    assert stored_tensors(path)["scalar"] == ((), torch.float64)


def test_a_folder_holds_safetensors_and_json_only(folder):
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert files == {"tensors.safetensors", "state.json", "manifest.json"}


def test_only_the_newest_are_kept(folder):
    save_checkpoint(folder, 40, TENSORS, {"step": 40}, keep=2)
    assert names(folder) == ["step-00000030", "step-00000040"]


def test_checkpoints_of_later_steps_go_when_a_run_was_resumed_before_them(folder):
    save_checkpoint(folder, 15, TENSORS, {"step": 15}, keep=3)
    assert names(folder) == ["step-00000010", "step-00000015"]


def test_no_folder_and_no_checkpoint_are_not_an_error(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


DAMAGES = {
    "a truncated tensor file": ("tensors.safetensors", truncate, "tensors.safetensors has 1"),
    "a flipped bit in the tensors": ("tensors.safetensors", flip_a_bit, "tensors.safetensors does not have the SHA"),
    "no tensor file": ("tensors.safetensors", Path.unlink, "tensors.safetensors is missing"),
    "an empty tensor file": ("tensors.safetensors", lambda file: file.write_bytes(b""), "has 0 bytes"),
    "a truncated state": ("state.json", truncate, "state.json has"),
    "a flipped bit in the state": ("state.json", flip_a_bit, "state.json does not have the SHA-256"),
    "no state": ("state.json", Path.unlink, "state.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "a truncated manifest": ("manifest.json", truncate, "manifest.json cannot be read"),
    "a manifest of random bytes": ("manifest.json", lambda file: file.write_bytes(os.urandom(500)), "cannot be read"),
    "a manifest of another kind": ("manifest.json", lambda file: file.write_text('["files"]'), "cannot be read"),
    "a manifest of nothing": ("manifest.json", lambda file: file.write_text('{"files": {}}'), "does not list state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, damage):
    file, spoil, said = DAMAGES[damage]
    spoil(folder / "step-00000030" / file)
    assert said in find_damage(folder / "step-00000030")
    with pytest.warns(UserWarning, match="step-00000030") as caught:
        assert newest_checkpoint(folder).name == "step-00000020"
    assert said in str(caught[0].message) and len(caught) == 1


@pytest.mark.parametrize("position", range(0, 100, 7))
def test_no_single_flipped_bit_in_a_manifest_gives_back_other_content(folder, position):
    """It is found, or it is in a place that means nothing (such as white space)."""
    manifest = folder / "step-00000030" / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[len(content) * position // 100] ^= 1 << position % 8
    manifest.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = newest_checkpoint(folder)
    tensors = {"weights": torch.zeros(30, 100)}
    load_tensors(path, tensors)
    assert torch.equal(tensors["weights"], TENSORS["weights"] + read_state(path)["step"])


def test_all_damaged_is_one_sentence_that_names_them_all(folder):
    for path in folder.iterdir():
        flip_a_bit(path / "tensors.safetensors")
    with pytest.raises(CourseError, match=r"step-00000030.*step-00000020.*step-00000010.*delete") as caught:
        newest_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_half_written_folder_is_ignored_and_removed_by_the_next_save(folder):
    half = folder / ".partial-step-00000040"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    assert newest_checkpoint(folder).name == "step-00000030"
    save_checkpoint(folder, 50, TENSORS, {"step": 50}, keep=1)
    assert names(folder) == ["step-00000050"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(folder):
    truncate(folder / "step-00000030" / "state.json")
    save_checkpoint(folder, 30, TENSORS, {"step": 31}, keep=3)
    assert find_damage(folder / "step-00000030") is None and read_state(folder / "step-00000030") == {"step": 31}


@pytest.mark.slow
def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    process = quick_processes().Process(target=die_at_every_operation, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    newest = [name for name, *_ in report]
    values = [value for _, value, *_ in report]
    assert len(report) > 15 and any(leftovers for *_, leftovers, _ in report)  # it was killed in the middle of things
    assert newest == sorted(newest) and {*newest} == {"step-00000001", "step-00000002"}
    assert values == [float(name[-1]) for name in newest]
    assert all(names_after == ["step-00000003"] for *_, names_after in report)


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoints(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        tensors = {"x": torch.arange(100_000.0)}  # 400 kB: two of them fit, three do not
        save_checkpoint(disk, 1, tensors, {"step": 1})
        save_checkpoint(disk, 2, tensors, {"step": 2})
        with pytest.raises(CourseError, match=r"step-00000003 could not be written \(.*[Nn]o space left") as caught:
            save_checkpoint(disk, 3, tensors, {"step": 3})
        assert "\n" not in str(caught.value)
        assert names(disk) == ["step-00000001", "step-00000002"]
        assert newest_checkpoint(disk).name == "step-00000002"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="could not be written"):
        save_checkpoint(tmp_path / "file", 1, TENSORS, {})
