"""Whether a folder holds what its card says: the files, by their hashes, and the measured numbers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from helpers.evaluation import Score
from helpers.files import sha256

DATA = {".safetensors", ".parquet", ".jsonl"}  # each such file stands in the card, with its hash
BESIDE = {".json", ".jinja", ".md"}
NAMED = re.compile(r"`([\w./-]+)`[^`\n]*`([0-9a-f]{64})`")


def disagreements(folder: Path) -> Iterator[str]:
    """What the folder and its card say differently, each as a sentence without its end."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if "README.md" not in files:
        yield "there is no README.md"
        return
    card = files["README.md"].read_text(encoding="utf-8")
    for name, path in files.items():
        if path.suffix not in DATA | BESIDE:
            yield f"{name} is no part of what is published"
    named = dict(NAMED.findall(card))
    data = {name for name, path in files.items() if path.suffix in DATA}
    if not data:
        yield "there are no weights and no data"
    for name in sorted(named.keys() | data):
        if name not in data:
            yield f"{name} stands in README.md, and is not there"
        elif name not in named:
            yield f"{name} is there, and README.md says nothing about it"
        elif sha256(files[name]) != named[name]:
            yield f"{name} is not the file that README.md speaks about"
    try:
        header = ModelCard(card).data
    except (ValueError, yaml.YAMLError):
        yield "the header of README.md cannot be read"
        return
    for field in ("license", "language", "tags"):
        if not header.get(field):
            yield f"the header of README.md has no {field}"
    if "abilities.json" in files:
        try:
            measured = {name: Score(**score) for name, score in json.loads(files["abilities.json"].read_text()).items()}
        except (ValueError, TypeError, AttributeError):
            yield "abilities.json cannot be read"
            return
        yield from numbers(card, header.eval_results or [], measured)


def numbers(card: str, results: list[EvalResult], measured: dict[str, Score]) -> Iterator[str]:
    """What the header and the table say differently from what was measured."""
    said = {result.metric_name: result.metric_value for result in results}
    for name in sorted(said.keys() - measured.keys()):
        yield f"the header of README.md has {name}, which abilities.json has not"
    for name, score in measured.items():
        if said.get(name) != score.accuracy:
            yield f"{name} is {score.accuracy} in abilities.json and {said.get(name)} in the header of README.md"
        if f"| {name} | {score} |" not in card:
            yield f"no line of README.md says that {name} is {score}"
