"""What is handed in: sixty folders of every sort are each accepted, or refused for the right reason, in one line."""

import json
import os
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from course.__main__ import main
from course.competition.submission import MOST_ROWS
from helpers.open_tasks import public_tasks
from tests.support.submissions import change_json, write_honest

ANSWERS, ROWS, CONFIG = "submission.jsonl", "train.jsonl", "adapter/adapter_config.json"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return write_honest(tmp_path_factory.mktemp("class") / "honest")


def lines_of(folder):
    return (folder / ANSWERS).read_text().splitlines()


def write_lines(folder, lines):
    (folder / ANSWERS).write_text("\n".join(lines) + "\n")


def with_header(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def with_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors):
    return tensors[sorted(tensors)[0]]


def fill(value):
    def change(tensors):
        first(tensors)[0, 0] = value

    return lambda folder: with_tensors(folder, change)


def link(name):
    def change(folder):
        target = folder.parent / f"target of {folder.name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


def pipe(folder):
    (folder / "report.md").unlink()
    os.mkfifo(folder / "report.md")


def directory(folder):
    (folder / ROWS).unlink()
    (folder / ROWS).mkdir()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def data(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def settings(name, **values):
    return lambda folder: change_json(folder / name, **values)


def shortened(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def entry(**values):
    return {"t": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} | values}


def task_rows(folder):
    task = public_tasks()[2]
    row = {"instruction": f"Please. {task.input.upper()}", "answer": task.reference}
    (folder / ROWS).write_text(json.dumps(row))


ACCEPTED = {
    "pretty-printed": lambda f: (f / ANSWERS).write_text(
        "\n".join(json.dumps(json.loads(line), indent=2) for line in lines_of(f))
    ),
    "ünïcødé 島 \N{BOUQUET}": lambda f: None,
    "shuffled": lambda f: write_lines(f, lines_of(f)[::-1]),
    "byte order mark": lambda f: (f / ANSWERS).write_text("\ufeff" + (f / ANSWERS).read_text()),
    "windows lines": lambda f: (f / ANSWERS).write_bytes((f / ANSWERS).read_bytes().replace(b"\n", b"\r\n")),
    "half precision": lambda f: save_file({k: v.half() for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
    "of a Mac": text(".DS_Store", ""),
    "preferences": text(ROWS, json.dumps({"instruction": "a", "chosen": "b", "rejected": "c"})),
    "no rows": text(ROWS, ""),
    "'; DROP TABLE": lambda f: None,
}
REFUSED = {
    "no adapter": (lambda f: shutil.rmtree(f / "adapter"), "adapter is missing"),
    "no report": (lambda f: (f / "report.md").unlink(), "report.md is missing"),
    "empty report": (text("report.md", " "), "report.md is empty"),
    "code": (text("model.py", "import os"), "'model.py' does not belong"),
    "pickle": (text("adapter/adapter_model.bin", ""), "does not belong"),
    "adapter is a link": (link("adapter"), "'adapter' is a link"),
    "answers are a link": (link(ANSWERS), "is a link"),
    "weights are a link": (link(WEIGHTS), "is a link"),
    "broken link": (lambda f: (f / "x").symlink_to("../../nowhere"), "is a link"),
    "pipe": (pipe, "not a plain file"),
    "directory for a file": (directory, "not a plain file"),
    "not a number": (fill(float("nan")), "not finite"),
    "infinite": (fill(float("inf")), "not finite"),
    "huge weight": (fill(1e30), "beyond 1000"),
    "wrong base": (settings("recipe.json", base_sha256="0" * 64), "another shima-4m-assistant by its hash"),
    "other base": (settings("recipe.json", base="shima-4m"), "another shima-4m by its hash"),
    "path as base": (settings("recipe.json", base="../../etc"), "has a base that is not shima-4m or"),
    "over budget": (settings("recipe.json", trained_tokens=600_001), "budget"),
    "unknown setting": (settings("decode.json", hook="os.system"), "unknown key 'hook'"),
    "format attack": (settings("decode.json", template="{input.__class__}"), "has a template that is not"),
    "endless": (settings("decode.json", max_new_tokens=10**9), "has a max_new_tokens that is not"),
    "true as a number": (settings("decode.json", num_samples=True), "has a num_samples that is not"),
    "many samples": (settings("decode.json", num_samples=1000), "has a num_samples that is not"),
    "setting is NaN": (text("decode.json", '{"temperature": NaN}'), "holds NaN"),
    "two objects": (text("decode.json", "{} {}"), "more than 1"),
    "a list": (text("decode.json", "[]"), "other than an object"),
    "missing setting": (text("recipe.json", "{}"), "lacks base"),
    "not a LoRA": (settings(CONFIG, peft_type="PREFIX_TUNING"), "not that of a LoRA"),
    "rank of a million": (settings(CONFIG, r=10**6), "has a r that is not"),
    "wrong rank": (settings(CONFIG, r=2), "has the shape"),
    "embeddings": (settings(CONFIG, target_modules=["embed_tokens"]), "has a target_modules that is not"),
    "modules as a pattern": (settings(CONFIG, target_modules="(a+)+$"), "has a target_modules that is not"),
    "saved modules": (settings(CONFIG, modules_to_save=["lm_head"]), "sets 'modules_to_save'"),
    "another layer": (settings(CONFIG, target_modules=["q_proj"]), "not a part of this adapter"),
    "tensor missing": (lambda f: with_tensors(f, lambda t: t.pop(sorted(t)[0])), "is missing"),
    "integers": (lambda f: with_tensors(f, lambda t: t.update(x=torch.ones(1, dtype=torch.int8))), "of type 'I8'"),
    "cut weights": (shortened(WEIGHTS), "cut off"),
    "empty weights": (data(WEIGHTS, b""), "cut off"),
    "header bomb": (data(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), "header is larger"),
    "nested header": (lambda f: with_header(f, b"[" * 60_000), "not JSON"),
    "many tensors": (lambda f: with_header(f, {str(i): {} for i in range(999)}), "999 tensors"),
    "overlap": (lambda f: with_header(f, entry() | {"u": entry()["t"]}, b"0000"), "overlap"),
    "gap": (lambda f: with_header(f, entry(data_offsets=[4, 8]), b"0" * 8), "gap"),
    "wrong size": (lambda f: with_header(f, entry(shape=[9, 9]), b"0000"), "as its shape asks"),
    "negative": (lambda f: with_header(f, entry(data_offsets=[-4, 0]), b""), "no sound entry"),
    "large adapter": (data(WEIGHTS, bytes(2**21 + 1)), "larger than 2048 KiB"),
    "10,000 rows": (text(ROWS, '{"instruction": "a", "answer": "b"}\n' * 10_000), f"more than {MOST_ROWS} entries"),
    "large rows": (text(ROWS, "x" * (2**22 + 1)), "larger than 4096 KiB"),
    "row is long": (text(ROWS, json.dumps({"instruction": "a" * 2001, "answer": ""})), "2001 characters"),
    "row without answer": (text(ROWS, '{"instruction": "a"}'), "has no text 'chosen'"),
    "public task": (task_rows, "1 of the public tasks word for word"),
    "99 answers": (lambda f: write_lines(f, lines_of(f)[:99]), "has 99 rows"),
    "101 answers": (lambda f: write_lines(f, [*lines_of(f), lines_of(f)[0]]), "more than 100 entries"),
    "twice": (lambda f: write_lines(f, [*lines_of(f)[:99], lines_of(f)[0]]), "answers task '000' twice"),
    "cut answers": (shortened(ANSWERS), "not JSON in entry 100"),
    "nested answers": (text(ANSWERS, '{"a":' * 50_000), "not JSON in entry 1"),
    "long answer": (text(ANSWERS, json.dumps({"task_id": "000", "output": "a" * 601})), "601 characters"),
    "half a character": (text(ANSWERS, '{"task_id": "000", "output": "\\ud800"}'), "not JSON"),
    "number as answer": (text(ANSWERS, '{"task_id": "000", "output": 5}'), "has no text 'output'"),
    "not UTF-8": (data(ANSWERS, b"\xff\xfe"), "not UTF-8"),
}


@pytest.fixture(scope="module")
def printed(honest, tmp_path_factory):
    """Name -> line of `check` on all of them at once."""
    folder = tmp_path_factory.mktemp("all")
    changes = ACCEPTED | {name: change for name, (change, _) in REFUSED.items()}
    assert len(changes) >= 60
    for name, change in changes.items():
        shutil.copytree(honest, folder / name)
        change(folder / name)
    (folder / "a file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda line, **_: lines.append(line))
        assert main(["competition", "check", *map(str, sorted(folder.iterdir()))]) == 1
    assert len(lines) == len(changes) + 1 + sum("link" in name and name != "broken link" for name in changes)
    assert all("\n" not in line for line in lines)
    return {line.split(": ")[0]: line.partition(": ")[2] for line in lines}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_honest_folder_is_accepted(printed, name):
    assert printed[name] == "accepted"


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_folder_is_refused_for_its_reason(printed, name):
    assert printed[name].startswith("refused: ") and REFUSED[name][1] in printed[name]


def test_what_is_no_folder_costs_one_line(printed):
    assert printed["a file"] == "refused: a file is no folder"


def test_score_grades_the_answers_and_reproduce_refuses_forged_ones(honest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["course.competition.command"], "OUT", tmp_path)
    forged = tmp_path / "forged"
    shutil.copytree(honest, forged)
    rows = [json.dumps({"task_id": task.task_id, "output": task.reference}) for task in public_tasks()]
    write_lines(forged, rows)
    assert main(["competition", "score", str(honest), str(forged)]) == 0
    first_line, second_line = capsys.readouterr().out.splitlines()
    assert second_line.startswith("forged: 5.00 (5.00 to 5.00)") and first_line.startswith("honest: ")
    assert np.isfinite(float(first_line.split()[1]))
    assert main(["competition", "reproduce", str(honest), str(forged)]) == 1
    first_line, second_line = capsys.readouterr().out.splitlines()
    assert first_line == "honest: 100 of 100 answers reproduced"
    assert second_line.startswith("forged: refused: only") and "come out of the weights" in second_line
