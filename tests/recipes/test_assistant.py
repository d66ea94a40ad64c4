"""shima-4m-assistant: what ships follows instructions; a build leaves a whole model behind, or the old one."""

import json
from dataclasses import replace

import pytest

from helpers.chat import chat_prompt, end_of_turn
from helpers.data import instruction_dataset
from helpers.errors import CourseError
from helpers.generation import answer_instructions
from helpers.models import load_assistant, load_model
from helpers.profiles import get_profile
from helpers.world import CHAT_TASKS, World
from recipes import assistant
from recipes.assistant import CONFIG, MODEL_FOLDER, build, evaluate, main


@pytest.fixture(scope="module")
def shipped():
    return load_assistant(get_profile("cpu"))


def quick_build(folder):
    """Build a model that is hardly trained, and measure few answers of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "NUM_EXAMPLES", 64)
        patch.setattr(assistant, "evaluate", lambda model, tokenizer, seed, n: evaluate(model, tokenizer, seed, 2))
        return build(folder, replace(CONFIG, max_steps=2, warmup_steps=1, progress=False))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a build, which began beside an older model and what an interrupted build had left behind."""
    folder = tmp_path_factory.mktemp("build") / "model"
    for left in (folder, folder.with_name(".model.partial")):
        left.mkdir()
        (left / "old").write_text("")
    assert tuple(quick_build(folder)) == CHAT_TASKS
    return folder


@pytest.mark.slow
def test_the_shipped_assistant_is_right_on_90_percent_of_each_task_on_a_fresh_seed(capsys):
    assert main(["evaluate", "--seed", "4321", "--n", "150", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert tuple(scores) == CHAT_TASKS
    for task, score in scores.items():
        assert score["accuracy"] >= 0.9, f"{task}: {score}"
        assert score["n"] == 150


def test_the_held_out_instructions_are_none_of_those_it_was_trained_on():
    trained = set(instruction_dataset("shima", assistant.NUM_EXAMPLES, seed=0)["instruction"])
    for task in CHAT_TASKS:
        asked = {question.prompt for question in World().chat_questions(150, 4321, (task,))}
        assert not asked & trained, task


def test_the_command_takes_a_seed_and_a_number_and_prints_json(capsys):
    printed = []
    for arguments in (["--json"], ["--json"], []):
        assert main(["evaluate", "--seed", "1", "--n", "5", *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert {task: score["n"] for task, score in json.loads(printed[0]).items()} == dict.fromkeys(CHAT_TASKS, 5)
    assert printed[0] == printed[1]
    assert [line.split()[0] for line in printed[2].splitlines()] == list(CHAT_TASKS)


def test_an_answer_ends_with_its_turn_also_for_generate_of_transformers(shipped):
    model, tokenizer = shipped
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    assert end in model.generation_config.eos_token_id
    instruction = "Add 23 + 41 + 17 and show the steps."
    prompt = tokenizer(chat_prompt(tokenizer, instruction), return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    (answer,) = answer_instructions(model, tokenizer, [instruction])
    assert tokenizer.decode(written) == answer + "<|end|>" and written[-1] == end


def test_the_card_tells_what_abilities_json_holds_and_how_it_was_made():
    card = (MODEL_FOLDER / "README.md").read_text()
    abilities = json.loads((MODEL_FOLDER / "abilities.json").read_text())
    assert tuple(abilities) == CHAT_TASKS
    for task, score in abilities.items():
        assert f"| {task} | {score['accuracy']:.0%}".replace("%", " %") in card
    assert f"{CONFIG.max_steps} steps of {assistant.BATCH_SIZE}" in card


def test_the_shipped_files_are_small_and_hold_no_pickle():
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert {path.suffix for path in MODEL_FOLDER.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_a_build_writes_a_model_that_loads_and_nothing_beside_it(built, monkeypatch):
    assert [path.name for path in built.parent.iterdir()] == ["model"]
    assert {path.name for path in built.iterdir()} == {path.name for path in MODEL_FOLDER.iterdir()}
    monkeypatch.setitem(assistant.MODEL_FOLDERS, "shima-4m-assistant", built)
    tuned, tokenizer = load_assistant(get_profile("cpu"))
    base, _ = load_model(get_profile("cpu"))
    assert (tuned.model.layers[0].mlp.up_proj.weight != base.model.layers[0].mlp.up_proj.weight).any()
    assert tokenizer.chat_template and "2 steps of 32" in (built / "README.md").read_text()


@pytest.mark.slow
def test_a_build_that_cannot_be_written_leaves_the_older_model_and_the_next_one_writes_the_same_weights(
    built, tmp_path, monkeypatch
):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("the older model")
    with monkeypatch.context() as patch:
        patch.setattr(assistant, "model_card", full_disk)  # the last thing that is written
        with pytest.raises(CourseError, match=r"could not be written \(.*No space left.*\): free some space"):
            quick_build(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "old").read_text() == "the older model"
    quick_build(folder)
    assert not (folder / "old").exists()
    assert (folder / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--n", "-3"]])
def test_a_number_that_cannot_be_drawn_is_named_in_one_sentence(arguments):
    with pytest.raises(CourseError, match=f"--n is {arguments[1]}"):
        main(["evaluate", *arguments])
