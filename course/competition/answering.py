"""What a submission answers: decoded from base and adapter, and kept in a folder by the hash of all that decides."""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from peft import get_peft_model, set_peft_model_state_dict

from course.competition.reading import refuse
from course.competition.submission import Submission
from helpers.files import write_atomically
from helpers.models import load_model
from helpers.open_tasks import Task, answer_tasks, public_tasks
from helpers.profiles import get_profile

SAME = 0.98  # share of the handed-in answers that must come out of the weights again


@cache
def base_model(base: str):
    """The base model and its tokenizer, on the CPU in float32."""
    return load_model(get_profile("cpu", base))


def answers_of(submission: Submission, tasks: Sequence[Task], kept: Path) -> list[str]:
    """Answers of the submission's weights to the tasks, from `kept` where they have been decoded before."""
    inputs = [task.input for task in tasks]
    path = kept / f"{hashlib.sha256(json.dumps([submission.key, inputs]).encode()).hexdigest()}.json"
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(answers, list) and len(answers) == len(tasks):
            return answers
    except (OSError, ValueError):
        pass
    base, tokenizer = base_model(submission.recipe.base)
    model = get_peft_model(copy.deepcopy(base), submission.lora).eval()
    set_peft_model_state_dict(model, submission.adapter)
    answers = answer_tasks(model, tokenizer, inputs, submission.decoding)
    kept.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(answers, ensure_ascii=False))
    return answers


def reproduced(submission: Submission, kept: Path) -> int:
    """How many of the handed-in answers the weights give again. CourseError if that are too few."""
    decoded = answers_of(submission, public_tasks(), kept)
    same = sum(a == b for a, b in zip(decoded, submission.answers, strict=True))
    if same < SAME * len(decoded):
        refuse(f"only {same} of {len(decoded)} handed-in answers come out of the weights, {SAME:.0%} must")
    return same
