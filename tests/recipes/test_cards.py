"""The committed cards are those that the recipes write, with a header that the hub reads."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from helpers.evaluation import Score
from helpers.models import MODEL_FOLDERS
from helpers.profiles import ROOT
from recipes import assistant, base_model
from recipes.cards import DATASET, weights_line


def scores(folder: Path) -> dict[str, Score]:
    return {name: Score(**score) for name, score in json.loads((folder / "abilities.json").read_text()).items()}


def test_the_card_of_the_base_model_is_the_one_that_its_recipe_writes():
    folder = base_model.MODEL_FOLDER
    card = (folder / "README.md").read_text(encoding="utf-8")
    parameters, tokens, minutes = re.search(
        r"\| ([\d,]+), stored in .*?, ([\d.]+) M tokens, (\d+) minutes", card, re.DOTALL
    ).groups()
    written = base_model.model_card(
        base_model.Recipe(**json.loads((folder / "recipe.json").read_text())),
        num_parameters=int(parameters.replace(",", "")),
        scores=scores(folder),
        tokens=round(float(tokens) * 1e6),
        minutes=int(minutes),
        weights=weights_line(folder),
    )
    assert card == written


def test_the_card_of_the_assistant_is_the_one_that_its_recipe_writes():
    folder = assistant.MODEL_FOLDER
    written = assistant.model_card(scores(folder), assistant.CONFIG, weights_line(folder))
    assert (folder / "README.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize(("name", "subset"), [("shima-4m", "questions"), ("shima-4m-assistant", "chats")])
def test_the_header_says_what_the_hub_wants_to_know_and_what_was_measured(name, subset):
    folder = MODEL_FOLDERS[name]
    data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (data.license, data.language, data.datasets) == ("mit", "en", [DATASET])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", name)
    assert data.base_model == (None if name == "shima-4m" else "llm-workbook/shima-4m")
    measured = {name: asdict(score)["accuracy"] for name, score in scores(folder).items()}
    assert {result.metric_name: result.metric_value for result in data.eval_results} == measured
    assert {(result.dataset_config, result.dataset_split) for result in data.eval_results} == {(subset, "test")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("data/**/README.md")), ids=lambda path: path.parent.name)
def test_files_and_modules_that_a_card_names_are_there(path):
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:recipes|helpers|course)[\w.]*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
    for file in re.findall(r"`((?:helpers|recipes|course|tests)/[\w/.]*)`", text):
        assert (ROOT / file).exists(), file
