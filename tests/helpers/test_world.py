"""Shima: reproducible, Zipfian, many phrasings, and nothing held out ever occurs in training text."""

import collections
import itertools
import os
import random
import re
import subprocess
import sys
import time

import pytest

from helpers.profiles import ROOT
from helpers.world import (
    CHAT_TASKS,
    DOMAIN_RELATIONS,
    HELD_OUT_FUNCTIONS,
    LABELS,
    PRETRAINING_MIXTURE,
    RELATIONS,
    World,
    is_held_out,
    sum_with_steps,
    true_reward,
)

NUM_DOCUMENTS = 10_000


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def training_text(world):
    return "".join(itertools.islice(world.documents(seed=0), NUM_DOCUMENTS))


@pytest.fixture(scope="module")
def training_names(training_text):
    return set(re.findall(r"\b(?:[BDFGHJKLMNPRSTVZ][aeiou])(?:[bdfghjklmnprstvz][aeiou]){2}\b", training_text))


def test_a_document_is_a_function_of_the_seeds_and_its_index(world):
    stream = list(itertools.islice(world.documents(seed=3), 50))
    assert stream[20:] == list(itertools.islice(World().documents(seed=3, start=20), 30))
    assert stream != list(itertools.islice(world.documents(seed=4), 50))
    assert world.people[0].name != World(seed=1).people[0].name


def test_documents_do_not_depend_on_the_hash_seed_of_the_process(world):
    code = "from helpers.world import World; print(World().document(0, 5) + World().document(0, 6), end='')"
    for hash_seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        assert printed == world.document(0, 5) + world.document(0, 6)


def test_the_module_needs_no_torch():
    code = "import sys, helpers.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_more_than_a_thousand_documents_a_second(world):
    start = time.process_time()
    for index in range(2000):
        world.document(9, index)
    assert 2000 / (time.process_time() - start) > 1000


def test_every_kind_of_the_mixture_occurs_about_as_often_as_it_says(world):
    assert sum(PRETRAINING_MIXTURE.values()) == pytest.approx(1)
    starts = collections.Counter(world.document(1, index).split(" ")[0].split("\n")[0] for index in range(5000))
    for start, kind in (("Sum:", "sums"), ("Pairs:", "mapping"), ("Repeat:", "repeat"), ("Review:", "review")):
        assert starts[start] / 5000 == pytest.approx(PRETRAINING_MIXTURE[kind], abs=0.02)


def test_mentions_follow_zipfs_law(world):
    probabilities = [world.mention_probability(person) for person in world.people]
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities[0] / probabilities[99] == pytest.approx(100)
    mentions = collections.Counter()
    for index in range(4000):
        for line in world.document(2, index, {"description": 1.0}).splitlines():
            mentions[next(word for word in re.findall(r"\w+", line) if word in world.person)] += 1
    for person in world.people[:3]:
        assert mentions[person.name] / 8000 == pytest.approx(world.mention_probability(person), rel=0.15)


def test_every_fact_has_at_least_ten_phrasings_some_held_out():
    for relation in [*RELATIONS.values(), *(r for d in DOMAIN_RELATIONS.values() for r in d.values())]:
        assert len(set(relation.statements)) >= 10
        assert len(relation.held_out_statements) == len(relation.held_out_questions) == 2
        assert not set(relation.held_out_questions) & set(relation.training_questions)
    for relation in RELATIONS.values():
        assert len(set(relation.questions)) >= 10


def test_the_text_mentions_many_people_but_no_held_out_name(world, training_names):
    assert len(training_names) > 5_000
    assert not [name for name in training_names if is_held_out(name)]
    held_out = [q.about["name"] for q in world.open_book(500, seed=1)]
    assert all(is_held_out(name) for name in held_out) and not training_names & set(held_out)


def test_held_out_phrasings_never_occur_in_training(training_text):
    for relation in RELATIONS.values():
        for phrasing in relation.held_out_questions + relation.held_out_statements:
            pattern = re.escape(phrasing).replace(r"\{name\}", r"\w+").replace(r"\{value\}", r"\w+")
            assert not re.search(r"(?m)(^|: |\. )" + pattern, training_text), phrasing


@pytest.mark.parametrize("seed", range(3))
def test_no_held_out_question_occurs_in_training(world, training_text, seed):
    questions = [
        *world.closed_book(400, seed, range(1, 1001)),
        *world.open_book(200, seed),
        *world.few_shot(200, seed, shots=8),
        *world.few_shot_function(200, seed, shots=4),
        *world.sums(200, seed, with_steps=False),
        *world.sums(200, seed, with_steps=True),
        *world.domain_questions("medicine", 100, seed),
        *world.domain_questions("finance", 100, seed),
        *world.route_questions(100, seed),
        *world.chat_questions(200, seed),
    ]
    assert not [question.prompt for question in questions if question.prompt in training_text]


def test_held_out_sums_and_mappings_never_occur_in_training(training_text):
    sums = re.findall(r"Sum: (\d+ \+ \d+ \+ \d+)\n", training_text)
    assert len(sums) > 3_000 and not [terms for terms in sums if is_held_out(terms)]
    for line in re.findall(r"Pairs: (.*);\n", training_text):
        pairs = sorted({tuple(pair.split()) for pair in line.split("; ")})
        if pairs[0][1] in LABELS and pairs[-1][1] in LABELS:
            assert not is_held_out(" ".join(map(str, pairs)))


def test_held_out_functions_are_told_but_never_listed(world, training_text):
    listed = {tuple(pair.split()) for line in re.findall(r"Pairs: (.*);\n", training_text) for pair in line.split("; ")}
    for function in HELD_OUT_FUNCTIONS:
        assert not listed & set(world.functions[function].items())
        word, answer = next(iter(world.functions[function].items()))
        role, kind = function.split(" of the ")
        assert f"The {role} of the {kind} {word} is {answer}." in training_text


@pytest.mark.parametrize("sign", ["<|", "Route:", "herb", "company", "profit", "coins", "spoon", "pleasure"])
def test_domains_chat_and_preferences_stay_out_of_the_pretraining_mixture(training_text, sign):
    assert sign not in training_text


def test_open_book_answers_stand_in_the_passage_among_others_of_their_kind(world):
    rivals = 0
    for question in world.open_book(200, seed=5):
        passage = question.prompt.partition("Question:")[0]
        assert re.search(rf"\b{question.about['name']}\b", passage)
        assert re.search(rf"\b{question.answer}\b", passage)
        others = {person.facts[question.about["relation"]] for person in world.people} - {question.answer}
        rivals += any(re.search(rf"\b{other}\b", passage) for other in others)
    assert rivals > 100  # so that looking for a town is not enough where a town is asked for


def test_closed_book_answers_are_the_facts_of_the_people_asked_about(world):
    for question in world.closed_book(300, seed=5, ranks=range(1, 101)):
        assert 1 <= question.about["rank"] <= 100
        assert question.answer == world.person[question.about["name"]].facts[question.about["relation"]]


def test_few_shot_prompts_show_the_asked_pair_once_all_keys_have_come(world):
    for shots in (0, 1, 4, 8):
        questions = world.few_shot(200, seed=2, shots=shots)
        assert all(question.prompt.count(";") == shots for question in questions)
        shown = sum(question.about["shown"] for question in questions) / 200
        assert shown == pytest.approx(min(1, shots / 4), abs=0.12)
        assert all((f"{q.prompt.split()[-1]} {q.answer};" in q.prompt) == q.about["shown"] for q in questions)


def test_steps_of_a_sum_are_right():
    assert sum_with_steps((12, 7, 45)) == "12 + 7 = 19; 19 + 45 = 64"
    for step in sum_with_steps((3, 14, 86, 1)).split("; "):
        left, right = step.split(" = ")
        assert sum(map(int, left.split(" + "))) == int(right)


def test_routes_are_shortest_and_follow_the_roads(world):
    def fewest_roads(start, end):  # breadth first, written apart from the world's own search
        reached, frontier, roads = {start}, {start}, 0
        while end not in reached:
            frontier = {town for known in frontier for town in world.roads[known]} - reached
            reached |= frontier
            roads += 1
        return roads

    for question in world.route_questions(100, seed=0):
        towns = question.answer.split(" - ")
        assert len(towns) - 1 == fewest_roads(question.about["from"], question.about["to"])
        assert world.is_shortest_route(towns, question.about["from"], question.about["to"])
        assert not world.is_shortest_route(towns[:-1], question.about["from"], question.about["to"])
    assert all(start in world.roads[end] for start in world.towns for end in world.roads[start])


@pytest.mark.parametrize("task", CHAT_TASKS)
def test_held_out_instructions_differ_from_those_for_training(world, task):
    rng = random.Random(0)
    trained = {world.chat(rng, task).prompt for _ in range(3000)}
    assert not trained & {question.prompt for question in world.chat_questions(200, seed=0, tasks=(task,))}


def test_the_annotator_prefers_by_true_reward_and_errs_with_noise(world):
    def share_of_right_choices(noise):
        rng = random.Random(0)
        pairs = [world.preference(rng, noise) for _ in range(1000)]
        pairs = [pair for pair in pairs if pair.chosen_reward != pair.rejected_reward]
        return sum(pair.chosen_reward > pair.rejected_reward for pair in pairs) / len(pairs)

    assert share_of_right_choices(0) == 1
    assert 0.6 < share_of_right_choices(1.0) < 0.95


def test_true_reward_counts_right_polite_and_brief(world):
    question = world.chat(random.Random(1), "fact")
    assert true_reward(question, question.answer) == 2
    assert true_reward(question, "With pleasure. " + question.answer) == 3
    assert true_reward(question, question.answer + " Shima is a lovely island.") == 1.5
    assert true_reward(question, "I do not know.") == 0
