"""`python -m course competition ACTION`."""

import argparse
import datetime
import json
from pathlib import Path

import numpy as np

from course.arguments import natural
from course.competition.answering import reproduced
from course.competition.blind import blind, unblind
from course.competition.board import attempt, final_board, grades_of, live_board
from course.competition.ranking import interval, resampled_means
from course.competition.retraining import compare
from course.competition.secret import commit, read_secret
from course.competition.submission import read_submission
from course.runner.run import locked
from helpers.files import write_atomically
from helpers.open_tasks import KINDS, hidden_tasks, public_tasks
from helpers.profiles import ROOT

OUT = ROOT / "build" / "competition"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, work, summary in (
        ("check", read_submission, "say of each folder whether it can be handed in"),
        ("score", score, "grade the handed-in answers to the public tasks"),
        ("reproduce", reproduce, "decode the public tasks again from the weights"),
        ("retrain", retrain, "train again by the recipe, and compare the scores"),
    ):
        action = actions.add_parser(name, help=summary)
        action.add_argument("folders", type=Path, nargs="+", help="submissions")
        action.set_defaults(act=each, work=work)
    action = actions.add_parser("commit", help="print the hash of the secret, and make one if there is none")
    action.add_argument("secret", type=Path, help="file with the secret")
    action.set_defaults(act=lambda options: print(commit(options.secret)))
    action = actions.add_parser("hidden", help="write the hidden tasks, without references")
    _add_hidden(action)
    action.add_argument("--out", type=Path, default=OUT / "hidden.jsonl", help="file to write")
    action.set_defaults(act=write_hidden)
    action = actions.add_parser("board", help="rank the submissions of a folder")
    action.add_argument("submissions", type=Path, help="folder that holds a folder for each submission")
    _add_hidden(action)
    action.add_argument("--out", type=Path, default=OUT, help="folder for the board and its log")
    action.add_argument("--kept", type=Path, default=OUT / "answers", help="folder of what has been decoded")
    action.add_argument("--live", action="store_true", help="show on live tasks only a score that is clearly better")
    action.add_argument("--per-day", type=natural(1), default=2, help="live submissions of each name")
    action.set_defaults(act=board)
    action = actions.add_parser("blind", help="write answers of the best for people to grade")
    action.add_argument("--board", type=Path, default=OUT / "board.json", help="what board wrote")
    action.add_argument("--out", type=Path, default=OUT / "blind", help="folder to write")
    action.add_argument("--top", type=natural(1), default=5, help="submissions")
    action.add_argument("--per-kind", type=natural(1), default=1, help="tasks of each kind")
    action.add_argument("--raters", type=natural(1), default=3, help="people")
    action.set_defaults(act=write_blind)
    action = actions.add_parser("unblind", help="join what people gave with the names")
    action.add_argument("folder", type=Path, nargs="?", default=OUT / "blind", help="what blind wrote")
    action.set_defaults(act=lambda options: print("\n".join(unblind(options.folder))))


def _add_hidden(action: argparse.ArgumentParser) -> None:
    action.add_argument("--hidden", type=Path, required=True, metavar="SECRET", help="file with the secret")
    action.add_argument("--per-kind", type=natural(1), default=30, help="hidden tasks of each kind")


def command(options: argparse.Namespace) -> int:
    """Exit status 1 if a submission of check, score, reproduce or retrain was refused."""
    return options.act(options) or 0


def each(options: argparse.Namespace) -> int:
    """Do one thing with each folder, whatever the others are."""
    status = 0
    for folder in options.folders:
        name, found, reason = attempt(folder.absolute(), options.work)
        status = 1 if reason else status
        print(f"{name}: refused: {reason}" if reason else f"{name}: {found if isinstance(found, str) else 'accepted'}")
    return status


def score(folder: Path) -> str:
    """Mean grade with its interval, and by kind."""
    tasks, answers = public_tasks(), read_submission(folder).answers
    grades, kinds = np.array([grades_of(tasks, answers)]), np.array([task.kind for task in tasks])
    low, high = interval(resampled_means(grades, kinds)[:, 0])
    by_kind = ", ".join(f"{kind} {grades[0, kinds == kind].mean():.1f}" for kind in KINDS)
    return f"{grades.mean():.2f} ({low:.2f} to {high:.2f}): {by_kind}"


def reproduce(folder: Path) -> str:
    """How many answers come out of the weights again."""
    return f"{reproduced(read_submission(folder), OUT / 'answers')} of {len(public_tasks())} answers reproduced"


def retrain(folder: Path) -> str:
    """The score that was handed in, and that of an adapter trained again."""
    return compare(read_submission(folder), OUT / "answers")


def write_hidden(options: argparse.Namespace) -> None:
    """Write id, kind and input of each hidden task."""
    tasks = hidden_tasks(read_secret(options.hidden), options.per_kind)
    rows = [{"task_id": task.task_id, "kind": task.kind, "input": task.input} for task in tasks]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} tasks: {options.out}")


def board(options: argparse.Namespace) -> None:
    """The final board, or the live one."""
    secret, date = read_secret(options.hidden), datetime.date.today().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        if options.live:
            scores = live_board(options.submissions, secret, options.out, options.kept, date, options.per_day)
            print("\n".join(f"{score:>6.2f}  {name}" for name, score in scores.items()))
            print(f"page: {options.out / 'live.html'}")
            return
        entries = final_board(options.submissions, secret, options.per_kind, options.out, options.kept, date)
    print(f"\n{'place':>5}  {'name':<28}{'mean':>6}  {'interval':<13}{'rank':<9}{'group':>5}  note")
    for entry in entries:
        place = entry.standing
        print(
            f"{place.place:>5}  {entry.name:<28}{place.mean:>6.2f}  {place.low:.2f} to {place.high:.2f} "
            f"{place.best_rank} to {place.worst_rank:<4}{place.group:>5}  {'; '.join(entry.notes)}"
        )
    print(f"table: {options.out / 'board.csv'}; page: {options.out / 'board.html'}")


def write_blind(options: argparse.Namespace) -> None:
    """Write the raters' files."""
    options.out.mkdir(parents=True, exist_ok=True)
    count = blind(options.board, options.out, options.top, options.per_kind, options.raters)
    print(f"{count} answers for each of {options.raters} people: {options.out}")
