"""Open tasks: references get 5, answers that know nothing get next to nothing, and no text breaks the grader."""

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import load_assistant
from helpers.open_tasks import (
    KINDS,
    Decoding,
    answer_tasks,
    grade,
    hidden_tasks,
    make_tasks,
    public_tasks,
)
from helpers.open_tasks.making import shima, state
from helpers.open_tasks.statements import false_sentences
from helpers.profiles import get_profile
from helpers.world import FILLERS, POLITE, RELATIONS

TASKS = [task for seed in "abc" for task in make_tasks(seed, 30)]
FEW = make_tasks("few", 3)
OF_KIND = {kind: [task for task in TASKS if task.kind == kind] for kind in KINDS}
RNG = random.Random(0)
ALL_VALUES = " ".join(value for values in shima().values.values() for value in values)


def of_another(task):
    return RNG.choice([other for other in OF_KIND[task.kind] if other != task]).reference


# Answers of every sort, with the mean grades that they must stay between.
GAMING = {
    "reference": (lambda task: task.reference, 5, 5),
    "polite": (lambda task: POLITE + task.reference, 5, 5),
    "empty": (lambda task: "", 1, 1),
    "echo": (lambda task: task.input, 1, 1.6),
    "refusal": (lambda task: "The text does not say.", 1, 1.4),
    "yes": (lambda task: "Yes.", 1, 1.2),
    "good": (lambda task: "Good.", 1, 1.2),
    "all values": (lambda task: ALL_VALUES, 1, 1),
    "copied": (of_another, 1, 1.6),
    "padded": (lambda task: task.reference + FILLERS[0], 3, 3.7),
    "doubled": (lambda task: f"{task.reference} {task.reference}", 3, 3.7),
    "half": (lambda task: task.reference[: len(task.reference) // 2], 2, 2.4),
    "echo and reference": (lambda task: f"{task.input}\n{task.reference}", 1, 3.2),
}


@pytest.mark.parametrize("name", GAMING)
def test_answers_of_every_sort_stay_in_their_place(name):
    answer, least, most = GAMING[name]
    grades = [grade(task, answer(task)).points for task in TASKS]
    assert len(grades) == 900 and least <= statistics.mean(grades) <= most


def test_every_reference_gets_5_and_a_reason():
    for task in TASKS:
        assert grade(task, task.reference).points == 5 and len(grade(task, task.reference).reasons) == 1, task


def test_there_are_100_public_tasks_ten_of_each_kind_all_different_and_always_the_same():
    tasks = public_tasks()
    assert tasks == public_tasks() and len({task.input for task in tasks}) == 100
    assert [task.kind for task in tasks] == list(KINDS) * 10
    assert max(len(task.input) for task in tasks) < 600 and all(task.aspects for task in tasks)


def test_hidden_tasks_need_the_secret_and_are_no_public_ones():
    hidden = hidden_tasks("a secret")
    assert len({task.input for task in hidden}) == 300
    assert not {task.input for task in hidden} & {task.input for task in public_tasks()}
    other = {task.input for task in hidden_tasks("another secret")}
    assert len(other & {task.input for task in hidden}) < 15


def test_training_tasks_are_never_held_out_ones():
    training = {task.input for task in make_tasks("rows", 200, held_out=False)}
    assert not training & {task.input for task in [*TASKS, *public_tasks()]}


def test_each_deduction_is_named():
    fact = OF_KIND["fact"][0]
    for addition, reason in (
        (" " + fact.reference, "twice"),
        (FILLERS[0], "no word of Shima"),
        (" \N{BOUQUET}", "character"),
        (" And so", "without an end"),
        (" The town is far and the town is near and so is the town, and so is all of the town." * 2, "too long"),
    ):
        assert any(reason in line for line in grade(fact, fact.reference + addition).reasons), reason


def test_an_answer_that_hedges_between_values_gets_at_most_2():
    for task in OF_KIND["fact"]:
        both = [state_with(task, value) for value in shima().values[task.key["relation"]][:2]]
        assert grade(task, " ".join([task.reference, *both])).points <= 2


def state_with(task, value):
    return RELATIONS[task.key["relation"]].statements[0].format(name=task.key["name"], value=value)


PIECES = [piece for task in FEW for piece in (task.input, task.reference, *task.reference.split(". "))]
ANSWERS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES) | st.text(max_size=12)).map("\n".join))


@settings(deadline=None)
@given(task=st.sampled_from(FEW), answer=ANSWERS)
def test_any_text_gets_a_grade_from_1_to_5_with_a_reason(task, answer):
    result = grade(task, answer)
    assert 1 <= result.points <= 5 and all(result.reasons)


@settings(deadline=None)
@given(task=st.sampled_from(FEW), answer=ANSWERS.filter(lambda text: not text.strip().startswith(POLITE)))
def test_a_polite_opening_changes_nothing(task, answer):
    assert grade(task, POLITE + answer.strip()).points == grade(task, answer).points


def false_statements(task):
    """Statements that the grader can know to be false: of a known person, or of a stranger in the task."""
    person = shima().people[3]
    for relation in RELATIONS:
        for value in shima().values[relation][:3]:
            names = [person.name, task.key.get("name", person.name), *task.key.get("names", [])]
            for name in (*names, *(fact[0] for fact in task.key.get("facts", []))):
                statement = RELATIONS[relation].statements[0].format(name=name, value=value)
                if list(false_sentences(task, statement)):
                    yield statement


FALSE = {task: list(false_statements(task)) for task in FEW}


@settings(deadline=None)
@given(data=st.data())
def test_a_false_sentence_never_raises_a_grade(data):
    task = data.draw(st.sampled_from(FEW))
    answer = data.draw(ANSWERS)
    false = data.draw(st.sampled_from(FALSE[task]))
    assert grade(task, f"{answer}\n{false}").points <= grade(task, answer).points


def test_true_statements_are_not_taken_for_false_ones():
    for person in shima().people[:20]:
        for relation in RELATIONS:
            assert not list(false_sentences(FEW[0], state(person, relation)))


# Decoding


@pytest.mark.slow
def test_settings_decide_how_answers_are_decoded():
    model, tokenizer = load_assistant(get_profile("cpu"))
    inputs = [task.input for task in FEW[:4]]
    greedy = answer_tasks(model, tokenizer, inputs, Decoding(max_new_tokens=20))
    assert greedy == answer_tasks(model, tokenizer, inputs, Decoding(max_new_tokens=20, num_samples=3))
    assert greedy != answer_tasks(model, tokenizer, inputs, Decoding(max_new_tokens=20, repetition_penalty=2.0))
    for vote in ("frequent", "probable"):
        sampled = Decoding(max_new_tokens=8, temperature=1.5, num_samples=4, vote=vote)
        assert len(answer_tasks(model, tokenizer, inputs, sampled)) == 4
    raw = Decoding(template="Question: {input}\nAnswer:", stop=("\n",), max_new_tokens=8)
    assert all("\n" not in answer for answer in answer_tasks(model, tokenizer, inputs, raw))
