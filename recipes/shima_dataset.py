"""Shima as a data set in files, with a card: what shima-4m reads and is asked, for who works without this repository.

    python -m recipes.shima_dataset                              # build/shima, half a minute
    python -m recipes.shima_dataset --format jsonl --world-seed 7

The same arguments give the same files, byte for byte. `datasets.load_dataset("build/shima", "chats")` reads them.
"""

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from huggingface_hub import DatasetCardData

from helpers.errors import CourseError, exit_cleanly
from helpers.files import replacing_folder, sha256
from helpers.profiles import ROOT
from helpers.world import CHAT_TASKS, RELATIONS, Question, World
from recipes.base_model import FREQUENT_RANKS, ability_questions
from recipes.cards import COURSE, TAGS, header

FOLDER = ROOT / "build" / "shima"
FORMATS = ("parquet", "jsonl")
# Whoever finds this text in training data knows that the card was in it.
CANARY = "shima canary 5b6f1c0e-8c6d-4f0e-9d0a-3e0c7a9b21f4"


@dataclass(frozen=True)
class Export:
    """All that decides what the files hold. With the numbers of the defaults they hold what the two models met."""

    world_seed: int = 0
    seed: int = 0
    documents: int = 50_000
    validation_documents: int = 1_000
    questions: int = 500  # of each ability
    chats: int = 3_000
    test_chats: int = 200  # of each task
    preferences: int = 2_000
    test_preferences: int = 500


Rows = list[dict[str, object]]


def configurations(export: Export) -> Iterator[tuple[str, dict[str, Rows]]]:
    """Each configuration's name and the rows of its splits."""
    world = World(export.world_seed)
    read = list(islice(world.documents(export.seed), export.documents))
    known = set(read)
    fresh = (text for text in world.documents(export.seed + 1) if text not in known)
    yield (
        "documents",
        {
            "train": [{"text": text} for text in read],
            "validation": [{"text": text} for text in islice(fresh, export.validation_documents)],
        },
    )
    questions = ability_questions(world, export.seed, export.questions)
    asked = [
        {"ability": ability, "prompt": item.prompt, "answer": item.answer}
        for ability, items in questions.items()
        for item in items
    ]
    yield "questions", {"test": asked}
    trained = [chat(question) for question in world.training_chats(export.chats, export.seed)]
    yield "chats", {"train": trained, "test": held_out_chats(world, export)}
    yield (
        "preferences",
        {
            "train": preferences(world, export.seed, export.preferences, held_out=False),
            "test": preferences(world, export.seed, export.test_preferences, held_out=True),
        },
    )


def held_out_chats(world: World, export: Export) -> Rows:
    """What `recipes.assistant evaluate` asks with this seed, task by task."""
    return [
        chat(question)
        for task in CHAT_TASKS
        for question in world.chat_questions(export.test_chats, export.seed, (task,))
    ]


def chat(question: Question) -> dict[str, object]:
    """A question as the messages of a user and an assistant."""
    messages = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.answer}]
    return {"task": question.ability.split("/")[1], "messages": messages}


def preferences(world: World, seed: int, n: int, held_out: bool) -> Rows:
    """`n` pairs of answers with the choice of an annotator who errs, and the true reward of each."""
    rng = random.Random(f"preferences/{seed}/{held_out}")
    drawn = [world.preference(rng, held_out=held_out) for _ in range(n)]
    return [
        {
            "prompt": item.question.prompt,
            "chosen": item.chosen,
            "rejected": item.rejected,
            "chosen_reward": item.chosen_reward,
            "rejected_reward": item.rejected_reward,
        }
        for item in drawn
    ]


def write(export: Export, folder: Path, file_format: str) -> None:
    """Write the files and the card in the place of `folder`; CourseError where the disk does not take them."""
    disable_progress_bars()
    configs, lines, total = [], [], 0
    try:
        with replacing_folder(folder) as beside:
            for name, splits in configurations(export):
                files = []
                for split, rows in splits.items():
                    path = beside / name / f"{split}.{file_format}"
                    path.parent.mkdir(exist_ok=True)
                    table = Dataset.from_list(rows)
                    table.to_parquet(path) if file_format == "parquet" else table.to_json(path)
                    within = path.relative_to(beside).as_posix()
                    files.append({"split": split, "path": within})
                    lines.append(f"| `{within}` | {len(rows):,} | {path.stat().st_size:,} | `{sha256(path)}` |")
                    total += len(rows)
                configs.append({"config_name": name, "data_files": files})
            configs[0]["default"] = True
            (beside / "README.md").write_text(dataset_card(export, file_format, configs, lines, total), "utf-8")
    except OSError as error:
        raise CourseError(
            f"{folder} could not be written ({error}): free some space or choose another --out."
        ) from error


def dataset_card(export: Export, file_format: str, configs: list[dict], lines: list[str], total: int) -> str:
    """The README of the data set: what it is, how it was made, what it must not be used for."""
    data = DatasetCardData(
        license="cc-by-4.0",
        language="en",
        pretty_name="Shima",
        task_categories=["text-generation", "question-answering"],
        annotations_creators="machine-generated",
        language_creators="machine-generated",
        source_datasets=["original"],
        size_categories=size_category(total),
        tags=TAGS,
        configs=configs,
    )
    given = " ".join(f"{flag(field.name)} {getattr(export, field.name)}" for field in fields(export))
    files = "\n".join(lines)
    return f"""{header(data)}
# Shima

Text about Shima, an invented island, in English: a world small enough that a model of 3.6 million parameters learns it
in an hour. It belongs to the {COURSE}, where *shima-4m* was trained on it.

| configuration | what it holds |
|---|---|
| `documents` | text for pretraining, in `text`; with the seeds 0 from the stream that shima-4m read |
| `questions` | held-out items of each ability of a base model: `ability`, `prompt` to be continued, `answer` |
| `chats` | instructions and right answers of six tasks: `task`, `messages`. The test split is held out |
| `preferences` | the choices of an annotator who errs: `prompt`, `chosen`, `rejected`, and the true reward of both |

```python
from datasets import load_dataset

load_dataset("FOLDER OR NAME OF THIS DATA SET", "chats", split="test")
```

## How it was made

A seeded program wrote all of it (`helpers/world/` of the course); nobody was asked and nothing was collected. The same
command and the same versions of the packages give the same files, byte for byte:

    python -m recipes.shima_dataset --format {file_format} {given}

People are mentioned by Zipf's law, so that a few are met all the time and most hardly ever. A hash of each name,
sum, mapping and review decides whether it is *held out*; the test splits use only such, or phrasings that training
never uses. `documents` of the validation split are none of those of its training split; short ones resemble each other.
An answer is right if it is equal to `answer`; in `sums_with_steps` only the sum after the steps counts, and a prompt of
`chat_format` is put into the model's chat format. Shima's medicine, finance and routes are not in the files.

| file | rows | bytes | SHA-256 |
|---|---|---|---|
{files}

## What it must not be used for

- **Not to train a model that will be asked about Shima as if it had not read it.** The course asks open models about
  Shima because they have not. Keep these files out of training corpora. Where it is too late, another `--world-seed`
  makes an island that nobody has read. This card is marked by `{CANARY}`.
- **Not as knowledge.** Nothing in it is true of the real world: its remedies heal nobody, its companies do not exist.
- **Not as a benchmark of general ability.** The items are narrow and regular; a right answer shows that a model reads,
  remembers or adds in these formats, and no more.

## Licence

The text is under CC BY 4.0, the program that wrote it under the MIT licence. Say that it is from the {COURSE}.
"""


def size_category(rows: int) -> str:
    """The hub's name for this number of rows."""
    return "n<1K" if rows < 1_000 else "1K<n<10K" if rows < 10_000 else "10K<n<100K" if rows < 100_000 else "100K<n<1M"


def flag(name: str) -> str:
    """The command line's name of a field of `Export`."""
    return f"--{name.replace('_', '-')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write Shima as a data set."""
    parser = argparse.ArgumentParser(prog="python -m recipes.shima_dataset", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder, which is replaced")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="of the files")
    for field in fields(Export):
        parser.add_argument(flag(field.name), type=int, default=field.default, help=f"default: {field.default}")
    options = parser.parse_args(arguments)
    export = Export(**{field.name: getattr(options, field.name) for field in fields(Export)})
    for field in fields(Export):
        number, least = getattr(export, field.name), 0 if "seed" in field.name else 1
        most = len(FREQUENT_RANKS) * len(RELATIONS) if field.name == "questions" else math.inf
        if not least <= number <= most:
            between = f"at least {least}" + f" and at most {most}" * (most < math.inf)
            raise CourseError(f"{flag(field.name)} is {number}: give a number of {between}.")
    write(export, options.out, options.format)
    print(f"The data set is ready: {options.out}")


if __name__ == "__main__":
    exit_cleanly(main)
