"""The final by people: answers of the best without names, in a new order for each rater, and the names put back."""

import csv
import hashlib
import io
import json
import math
import random
from pathlib import Path

import numpy as np

from course.competition.agreement import krippendorff_alpha, weighted_kappa
from course.grading.report import write_table
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.open_tasks import KINDS, hidden_tasks

COLUMNS = ("item", "input", "aspects", "reference", "answer", "score")


def blind(board: Path, out: Path, top: int, per_kind: int, raters: int) -> int:
    """Write rater_1.csv and so on, and key.json, which raters must not see. Returns the number of items for each."""
    content = _read_json(board)
    secret, entries = content["secret"], content["entries"][:top]
    tasks = hidden_tasks(secret, content["per_kind"])
    rng = random.Random(f"blind/{secret}")
    chosen = [
        place
        for kind in KINDS
        for place in rng.sample([p for p, task in enumerate(tasks) if task.kind == kind], per_kind)
    ]
    key = {}
    for rater in range(1, raters + 1):
        rows = []
        for entry in entries:
            for place in chosen:
                name = f"{secret}/{rater}/{entry['name']}/{place}"
                item = hashlib.sha256(name.encode()).hexdigest()[:10]
                key[item] = {"rater": rater, "name": entry["name"], "place": place, "rubric": entry["grades"][place]}
                task = tasks[place]
                rows.append([item, task.input, task.aspects, task.reference, entry["answers"][place], ""])
        rng.shuffle(rows)
        write_table(out / f"rater_{rater}.csv", COLUMNS, rows)
    write_atomically(out / "key.json", json.dumps(key, indent=1, ensure_ascii=False) + "\n")
    return len(entries) * len(chosen)


def unblind(folder: Path) -> list[str]:
    """Lines that say what people gave each submission, and how far they agree with each other and with the rubric."""
    key = _read_json(folder / "key.json")
    raters = sorted({entry["rater"] for entry in key.values()})
    places = sorted({(entry["name"], entry["place"]) for entry in key.values()})
    grades = np.full((len(raters), len(places)), math.nan)  # (raters, items)
    rubric = np.zeros(len(places))
    scores = {}
    for rater in raters:
        scores |= _read_scores(folder / f"rater_{rater}.csv", {i for i, e in key.items() if e["rater"] == rater})
    for item, entry in key.items():
        place = places.index((entry["name"], entry["place"]))
        grades[raters.index(entry["rater"]), place] = scores.get(item, math.nan)
        rubric[place] = entry["rubric"]
    if np.isnan(grades).all():
        raise CourseError(f"No score is filled in yet in {folder}: give the raters their files, and put them back.")
    names = sorted({name for name, _ in places})
    lines = [f"{'submission':<28}{'people':>8}{'rubric':>8}{'scores':>8}"]
    means = []
    for name in names:
        own = np.array([entry == name for entry, _ in places])
        given = grades[:, own]
        people = float(np.nanmean(given)) if (~np.isnan(given)).any() else math.nan
        means.append((-people, f"{name:<28}{people:>8.2f}{rubric[own].mean():>8.2f}{(~np.isnan(given)).sum():>8}"))
    lines += [line for _, line in sorted(means)]
    for rater, row in zip(raters, grades, strict=True):
        given = ~np.isnan(row)
        if given.any():
            kappa = weighted_kappa(row[given], rubric[given])
            lines.append(f"rater {rater} and the rubric: weighted kappa {kappa:.2f} on {given.sum()} answers")
    lines.append(f"the raters among each other: Krippendorff's alpha {krippendorff_alpha(grades):.2f}")
    return lines


def _read_scores(path: Path, items: set[str]) -> dict[str, float]:
    """Item -> score of what the rater filled in. CourseError for another number than 1 to 5, and for unknown items."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CourseError(f"{path.name} cannot be read ({type(error).__name__}): save it as CSV in UTF-8.") from None
    scores = {}
    for row in rows:
        item, text = (row.get("item") or "").strip(), (row.get("score") or "").strip()
        if item not in items:
            raise CourseError(f"{path.name} has the unknown item {item[:20]!a}: use the file as it was handed out.")
        if text and text not in ("1", "2", "3", "4", "5"):
            raise CourseError(f"{path.name} gives {item} the score {text[:20]!a}: write a whole number from 1 to 5.")
        if text:
            scores[item] = float(text)
    return scores


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CourseError(f"{path} is missing or damaged: write it with board, or with blind.") from None
