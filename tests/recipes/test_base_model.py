"""shima-4m: what ships can do what the course needs; a build continues, and never leaves half a model behind."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from helpers.errors import CourseError
from helpers.models import load_model
from helpers.profiles import ROOT, get_profile
from helpers.world import World
from recipes import base_model
from recipes.base_model import MODEL_FOLDER, SPECIAL_TOKENS, TARGETS, Recipe, build, evaluate, main, make_tokenizer

SMALL = Recipe(tokenizer_documents=400, hidden_size=32, num_layers=1, intermediate_size=64, batch_size=2, steps=3)


@pytest.fixture(scope="module")
def shipped():
    return load_model(get_profile("cpu"))


def small_build(folder, work):
    """Build a model and measure few answers of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            base_model, "evaluate", lambda model, tokenizer, seed, n, **_: evaluate(model, tokenizer, seed, min(n, 4))
        )
        build(SMALL, folder, work)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A model of the smallest recipe, built to the end."""
    folder = tmp_path_factory.mktemp("build")
    small_build(folder / "model", folder / "work")
    return folder


# ---------------------------------------------------------------- the model that ships


@pytest.mark.slow
def test_the_shipped_model_meets_every_target_on_a_fresh_seed(capsys):
    assert main(["evaluate", "--seed", "12345", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores.keys() == TARGETS.keys()
    for name, score in scores.items():
        least, most = TARGETS[name]
        assert least <= score["accuracy"] <= most, f"{name}: {score}"
        assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1 and score["n"] == 200


def test_the_model_card_tells_what_abilities_json_holds():
    card = (MODEL_FOLDER / "README.md").read_text()
    abilities = json.loads((MODEL_FOLDER / "abilities.json").read_text())
    assert abilities.keys() == TARGETS.keys()
    for name, score in abilities.items():
        assert f"| {name} | {score['accuracy']:.0%}".replace("%", " %") in card


def test_the_curve_shows_loss_and_abilities_over_the_same_tokens():
    curve = json.loads((MODEL_FOLDER / "training_curve.json").read_text())
    assert len(curve["tokens"]) == len(curve["loss"]) > 100
    assert curve["tokens"] == sorted(curve["tokens"]) and curve["loss"][-1] < curve["loss"][0] / 4
    last = curve["evaluations"][-1]
    assert last["tokens"] == pytest.approx(curve["tokens"][-1], rel=0.01)
    assert last["few_shot_8"] > 0.8 > 0.4 > curve["evaluations"][0]["few_shot_8"]


def test_the_shipped_files_are_small_and_hold_no_pickle():
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert {path.suffix for path in MODEL_FOLDER.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_the_shipped_tokenizer_is_the_one_that_the_recipe_makes(shipped):
    """So the world has not changed since the model was built: where this fails, `make base` is due."""
    recipe = Recipe()
    assert json.loads((MODEL_FOLDER / "recipe.json").read_text()) == asdict(recipe)
    world = World(recipe.world_seed)
    documents = [world.document(-1, index) for index in range(recipe.tokenizer_documents)]
    assert make_tokenizer(documents, recipe.vocab_size).get_vocab() == shipped[1].get_vocab()


def test_the_tokenizer_splits_digits_keeps_any_text_and_knows_the_special_tokens(shipped):
    _, tokenizer = shipped
    assert tokenizer.tokenize("1234") == list("1234")
    for text in ("Grüße aus 島 🙂", "  two\n\nlines\t", "<|nothing|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [len(tokenizer(token)["input_ids"]) for token in SPECIAL_TOKENS] == [1] * len(SPECIAL_TOKENS)


def test_the_chat_template_marks_what_the_assistant_says(shipped):
    _, tokenizer = shipped
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Good day.<|end|>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


# ---------------------------------------------------------------- evaluating


def test_items_differ_between_seeds_and_not_between_calls(shipped):
    first, again, other = (base_model.ability_questions(World(), seed, 20) for seed in (1, 1, 2))
    assert first == again
    for name in TARGETS:
        assert first[name] != other[name]


def test_the_same_seed_gives_the_same_scores(shipped):
    assert evaluate(*shipped, seed=3, n=5) == evaluate(*shipped, seed=3, n=5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--n", "0"], "--n is 0"),
        (["--n", "100000"], "--n is 100000"),
        (["--model", "shima-5m"], "no model 'shima-5m'"),
        (["--model", str(ROOT / "tests")], "no config.json"),
    ],
)
def test_bad_input_is_named(arguments, reason):
    with pytest.raises(CourseError, match=reason):
        main(["evaluate", *arguments])


# ---------------------------------------------------------------- building


def test_a_build_writes_a_whole_model_folder_that_loads(built):
    model, _ = load_model(get_profile("cpu", str(built / "model")))
    assert model.config.hidden_size == SMALL.hidden_size
    names = {path.name for path in (built / "model").iterdir()}
    assert names >= {path.name for path in MODEL_FOLDER.iterdir()}
    assert [path.name for path in built.iterdir() if path.name.startswith(".")] == []


def test_a_finished_build_repeated_writes_the_same_weights(built):
    before = (built / "model" / "model.safetensors").read_bytes()
    small_build(built / "again", built / "work")
    assert (built / "again" / "model.safetensors").read_bytes() == before


def test_another_recipe_does_not_continue_the_build(built):
    with pytest.raises(CourseError, match="another recipe"):
        build(replace(SMALL, hidden_size=64), built / "model", built / "work")


def test_a_model_that_cannot_be_written_leaves_the_old_one_and_no_half_of_the_new_one(built, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CourseError, match="could not be written"):
        small_build(tmp_path / "file" / "model", built / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert main(["evaluate", "--model", str(built / "model"), "--n", "2"]) == 0


@pytest.mark.gpu
def test_a_build_uses_the_gpu(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    small_build(tmp_path / "model", tmp_path / "work")
    assert torch.cuda.max_memory_allocated() > 0
