"""Publishing lists by default, refuses what its card does not say, and uploads each repository in one commit."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, DatasetCard, ModelCard

from course.__main__ import main
from course.publish import upload
from course.publish.agreement import disagreements
from course.publish.upload import Item, contents, publish
from helpers.errors import CourseError
from helpers.evaluation import score
from helpers.files import sha256
from helpers.models import MODEL_FOLDERS
from helpers.profiles import ROOT
from recipes import assistant, shima_dataset
from recipes.cards import weights_line


class Hub:
    """The part of `HfApi` that is used; it keeps what it is told, and refuses the repositories in `refused`."""

    def __init__(self, *refused: str):
        self.refused, self.repositories, self.commits = refused, {}, []

    def create_repo(self, name: str, *, repo_type: str, exist_ok: bool) -> None:
        assert exist_ok
        if name in self.refused:
            raise ConnectionError("no connection.")
        self.repositories.setdefault(name, (repo_type, {".gitattributes": b""}))

    def list_repo_files(self, name: str, *, repo_type: str) -> list[str]:
        kind, files = self.repositories[name]
        assert kind == repo_type
        return list(files)

    def create_commit(self, name: str, operations: list, *, commit_message: str, repo_type: str) -> None:
        kind, files = self.repositories[name]
        assert kind == repo_type
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                files[operation.path_in_repo] = operation.path_or_fileobj
        self.commits.append((name, commit_message))


@pytest.fixture
def model(tmp_path: Path) -> Item:
    """A folder that has all that a model's has, and no weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    scores = {"fact": score(955, 1000), "sum": score(1, 3)}
    (folder / "abilities.json").write_text(json.dumps({name: asdict(value) for name, value in scores.items()}))
    (folder / "README.md").write_text(assistant.model_card(scores, assistant.CONFIG, weights_line(folder)))
    return Item("tiny", folder, "model", ROOT / "LICENSE")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Item:
    export = shima_dataset.Export(0, 0, 20, 5, 2, 4, 1, 3, 2)
    folder = tmp_path_factory.mktemp("publish") / "shima"
    shima_dataset.write(export, folder, "jsonl")
    return Item("shima", folder, "dataset", ROOT / "LICENSES" / "CC-BY-4.0.txt")


@pytest.mark.parametrize("name", MODEL_FOLDERS)
def test_the_committed_models_are_what_their_cards_say(name):
    assert list(disagreements(MODEL_FOLDERS[name])) == []


def test_a_data_set_is_what_its_card_says(data_set):
    assert list(disagreements(data_set.folder)) == []


def test_without_upload_it_lists_files_and_sizes_and_asks_nobody(monkeypatch, capsys, data_set):
    for name in ("HfApi", "get_token", "hub_is_reachable"):
        monkeypatch.setattr(upload, name, lambda *_: pytest.fail("the hub was asked"))
    main(["publish", "--owner", "ada", "--data-set", str(data_set.folder)])
    printed = capsys.readouterr().out
    for name, folder in MODEL_FOLDERS.items():
        assert f"ada/{name} (model)" in printed
        assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in printed
    assert "ada/shima (dataset)" in printed and "Nothing was uploaded" in printed


def test_each_repository_is_one_commit_of_its_files_with_the_licence_and_nothing_of_an_earlier_one(
    model, data_set, capsys
):
    hub = Hub()
    hub.create_repo("ada/tiny", repo_type="model", exist_ok=True)
    hub.repositories["ada/tiny"][1]["old.bin"] = b"old"
    publish([model, data_set], "ada", hub)
    assert [name for name, _ in hub.commits] == ["ada/tiny", "ada/shima"]
    files = hub.repositories["ada/tiny"][1]
    assert files.keys() == {path.name for path in model.folder.iterdir()} | {"LICENSE", ".gitattributes"}
    assert files["model.safetensors"] == b"weights" and files["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert hub.repositories["ada/shima"][1]["chats/test.jsonl"] == (data_set.folder / "chats/test.jsonl").read_bytes()
    assert capsys.readouterr().out == "published ada/tiny\npublished ada/shima\n"


def test_the_card_on_the_hub_names_the_owners_repositories(model, data_set):
    card = ModelCard(contents(model, "ada")["README.md"].decode())
    assert (card.data.base_model, card.data.datasets) == ("ada/shima-4m", ["ada/shima"])
    assert {result.dataset_type for result in card.data.eval_results} == {"ada/shima"}
    assert "](https://huggingface.co/ada/shima-4m)" in card.text and "](../" not in card.text
    assert DatasetCard(contents(data_set, "ada")["README.md"].decode()).data.license == "cc-by-4.0"


def test_what_was_published_before_the_hub_refused_is_said(model, data_set):
    hub = Hub("ada/shima")
    with pytest.raises(CourseError, match=r"did not take ada/shima \(no connection\); published before it: ada/tiny\."):
        publish([model, data_set], "ada", hub)


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("model.safetensors", "weights", "others", "model.safetensors is not the file that README.md speaks about"),
        ("abilities.json", "0.955", "0.965", "fact is 0.965 in abilities.json and 0.955 in the header"),
        ("README.md", "value: 0.955", "value: 0.99", "fact is 0.955 in abilities.json and 0.99 in the header"),
        ("README.md", "| fact | 96 %", "| fact | 99 %", "no line of README.md says that fact is 96 %"),
        ("README.md", "name: sum", "name: moon", "header of README.md has moon, which abilities.json has not"),
        ("README.md", "license: mit", "licence: mit", "the header of README.md has no license"),
        ("README.md", "language: en", "language: [en", "the header of README.md cannot be read"),
        ("README.md", "`model.safetensors`, SHA", "The SHA", "is there, and README.md says nothing about it"),
        ("abilities.json", '"n"', '"m"', "abilities.json cannot be read"),
    ],
)
def test_a_planted_disagreement_is_found(model, file, old, new, said):
    edit(model.folder, file, old, new)
    assert any(said in found for found in disagreements(model.folder))


def test_missing_and_foreign_files_are_found(model, data_set, tmp_path):
    (model.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (model.folder / "model.safetensors").unlink()
    assert list(disagreements(model.folder)) == [
        "pytorch_model.bin is no part of what is published",
        "there are no weights and no data",
        "model.safetensors stands in README.md, and is not there",
    ]
    assert list(disagreements(tmp_path)) == ["there is no README.md"]


def test_the_command_refuses_before_it_uploads_anything(model, monkeypatch):
    monkeypatch.setattr(upload, "MODEL_FOLDERS", {"tiny": model.folder})
    monkeypatch.setattr(upload, "HfApi", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setattr(upload, "get_token", lambda: None)
    with pytest.raises(CourseError, match=r"^There is no token for the hub: set HF_TOKEN, or run `hf auth login`\.$"):
        main(["publish", "--upload"])
    with pytest.raises(CourseError, match="There is no folder nowhere: make it"):
        main(["publish", "--data-set", "nowhere"])
    with pytest.raises(CourseError, match="'a/b' is no account of the hub"):
        main(["publish", "--owner", "a/b"])
    edit(model.folder, "model.safetensors", "weights", "others")
    with pytest.raises(CourseError, match=r"tiny is not published, for model\.safetensors is not the file"):
        main(["publish", "--upload"])


def test_with_a_token_and_a_network_it_uploads(model, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(upload, "MODEL_FOLDERS", {"tiny": model.folder})
    monkeypatch.setattr(upload, "HfApi", lambda: hub)
    monkeypatch.setattr(upload, "get_token", lambda: "a token")
    monkeypatch.setattr(upload, "hub_is_reachable", lambda: True)
    main(["publish", "--owner", "ada", "--upload"])
    assert [name for name, _ in hub.commits] == ["ada/tiny"]


def test_a_hash_is_that_of_the_file(model):
    assert sha256(model.folder / "config.json") == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
