"""Shima as a data set: what the models met, the same bytes each time, and read by `datasets` without a network."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from helpers.data import instruction_dataset
from helpers.errors import CourseError
from helpers.world import CHAT_TASKS, World
from recipes.base_model import TARGETS, ability_questions
from recipes.shima_dataset import CANARY, FORMATS, Export, main, size_category, write

SMALL = Export(
    documents=300,
    validation_documents=100,
    questions=3,
    chats=20,
    test_chats=2,
    preferences=10,
    test_preferences=5,
)
SPLITS = {
    "documents": {"train": 300, "validation": 100},
    "questions": {"test": 3 * len(TARGETS)},
    "chats": {"train": 20, "test": 2 * len(CHAT_TASKS)},
    "preferences": {"train": 10, "test": 5},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shima")
    for file_format in FORMATS:
        write(SMALL, folder / file_format, file_format)
    return {file_format: folder / file_format for file_format in FORMATS}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A reader that caches nothing beyond the test."""

    def rows(folder: Path, *arguments: str):
        return load_dataset(str(folder), *arguments, cache_dir=str(tmp_path))

    return rows


@pytest.mark.parametrize("file_format", FORMATS)
def test_datasets_reads_every_configuration_and_the_documents_where_none_is_named(written, read, file_format):
    for name, splits in SPLITS.items():
        assert {split: len(rows) for split, rows in read(written[file_format], name).items()} == splits
    assert read(written[file_format])["train"].column_names == ["text"]


def test_both_formats_hold_the_same_rows(written, read):
    for name in SPLITS:
        parquet, jsonl = (read(written[file_format], name) for file_format in FORMATS)
        for split in parquet:
            assert parquet[split].to_list() == jsonl[split].to_list()


def test_the_rows_are_those_that_the_models_met(written, read):
    world, folder = World(), written["jsonl"]
    documents = read(folder)
    assert documents["train"]["text"][:] == [world.document(0, index) for index in range(300)]
    assert not set(documents["train"]["text"]) & set(documents["validation"]["text"])
    asked = [question.prompt for questions in ability_questions(world, 0, 3).values() for question in questions]
    assert read(folder, "questions")["test"]["prompt"][:] == asked
    chats = read(folder, "chats")
    trained = instruction_dataset("shima", 20, seed=0)
    assert [[turn["content"] for turn in row] for row in chats["train"]["messages"]] == [
        [row["instruction"], row["answer"]] for row in trained
    ]
    evaluated = [question.prompt for task in CHAT_TASKS for question in world.chat_questions(2, 0, (task,))]
    assert [row[0]["content"] for row in chats["test"]["messages"]] == evaluated


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(written, tmp_path, file_format):
    write(SMALL, tmp_path / "again", file_format)
    assert files(tmp_path / "again") == files(written[file_format])
    write(replace(SMALL, world_seed=7), tmp_path / "other", file_format)
    others = files(tmp_path / "other")
    assert not [name for name, content in files(written[file_format]).items() if others[name] == content]


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_card_names_each_file_with_its_hash_and_says_licence_origin_and_limits(written, file_format):
    folder = written[file_format]
    card = DatasetCard((folder / "README.md").read_text())
    assert (card.data.license, card.data.size_categories) == ("cc-by-4.0", "n<1K")
    for name, content in files(folder).items():
        if name != "README.md":
            assert f"| `{name}` | " in card.text and f"`{hashlib.sha256(content).hexdigest()}`" in card.text
    for part in ("## How it was made", "## What it must not be used for", CANARY, "CC BY 4.0", "--documents 300"):
        assert part in card.text


def test_the_command_takes_sizes_and_a_later_one_replaces_the_folder(tmp_path, capsys):
    small = ["--documents", "2", "--validation-documents", "1", "--questions", "1", "--chats", "1"]
    small += ["--test-chats", "1", "--preferences", "1", "--test-preferences", "1", "--out", str(tmp_path / "out")]
    main([*small, "--format", "jsonl"])
    (row, _) = (tmp_path / "out" / "documents" / "train.jsonl").read_text().splitlines()
    assert json.loads(row) == {"text": World().document(0, 0)}
    main(small)
    assert {path.suffix for path in (tmp_path / "out").rglob("*.*")} == {".parquet", ".md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--documents", "0"], "--documents is 0: give a number of at least 1."),
        (["--world-seed", "-1"], "--world-seed is -1: give a number of at least 0."),
        (["--questions", "501"], "--questions is 501: give a number of at least 1 and at most 500."),
    ],
)
def test_a_number_that_cannot_be_is_one_sentence(arguments, said, tmp_path):
    with pytest.raises(CourseError, match=f"^{said}$"):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_sizes_have_the_hubs_names():
    names = [size_category(rows) for rows in (999, 1_000, 10_000, 100_000)]
    assert names == ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"]
