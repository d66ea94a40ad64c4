"""Publishes the two models, and Shima as a data set, on the Hugging Face hub, each in one commit.

Without `--upload` it only lists what it would do. The token is the one of HF_TOKEN, or of `hf auth login`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from course.publish.agreement import disagreements
from helpers.colab import REPOSITORY, TAG
from helpers.errors import CourseError
from helpers.hub import hub_is_reachable
from helpers.models import MODEL_FOLDERS
from helpers.profiles import ROOT

OWNER = re.compile(r"[A-Za-z0-9][\w.-]*")
HUB_NAME = re.compile(r"(?m)(?<= )[\w.-]+(?=/shima)")  # the owner, in a line of a card's header
OTHER_CARD = re.compile(r"\]\(\.\./([\w-]+)/README\.md\)")


@dataclass(frozen=True)
class Item:
    """A folder that becomes a repository of this name."""

    name: str
    folder: Path
    kind: str  # "model" or "dataset"
    licence: Path


def contents(item: Item, owner: str) -> dict[str, bytes]:
    """The files by their names on the hub; the card leads to the owner's repositories."""
    files = {
        path.relative_to(item.folder).as_posix(): path.read_bytes()
        for path in sorted(item.folder.rglob("*"))
        if path.is_file()
    }
    _, header, text = files["README.md"].decode().split("---\n", 2)
    text = OTHER_CARD.sub(rf"](https://huggingface.co/{owner}/\1)", text)
    card = f"---\n{HUB_NAME.sub(owner, header)}---\n{text}"
    return files | {"README.md": card.encode(), "LICENSE": item.licence.read_bytes()}


def check(items: Sequence[Item]) -> None:
    """CourseError for the first folder that is not there, or does not hold what its card says."""
    for item in items:
        if not item.folder.is_dir():
            raise CourseError(f"There is no folder {item.folder}: make it, or leave it out.")
        if wrong := next(disagreements(item.folder), None):
            raise CourseError(f"{item.folder} is not published, for {wrong}: build it anew, or restore it.")


def publish(items: Sequence[Item], owner: str, api: HfApi) -> None:
    """Upload each item in one commit that also removes what is no longer in it; CourseError if the hub refuses."""
    done: list[str] = []
    for item in items:
        name, files = f"{owner}/{item.name}", contents(item, owner)
        try:
            api.create_repo(name, repo_type=item.kind, exist_ok=True)
            old = set(api.list_repo_files(name, repo_type=item.kind)) - files.keys() - {".gitattributes"}
            api.create_commit(
                name,
                [
                    *(CommitOperationAdd(path, content) for path, content in files.items()),
                    *(CommitOperationDelete(path) for path in sorted(old)),
                ],
                commit_message=f"LLM Workbook {TAG}",
                repo_type=item.kind,
            )
        except Exception as error:  # what it raises changes with the version of the hub's client
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise CourseError(
                f"The hub did not take {name} ({reason}); published before it: {', '.join(done) or 'nothing'}. "
                "Amend that and run the command again."
            ) from error
        done.append(name)
        print(f"published {name}")


def listing(item: Item, owner: str) -> str:
    """What would be uploaded, with the bytes of each file."""
    files = contents(item, owner)
    lines = [f"{len(content):>13,}  {name}" for name, content in files.items()]
    total = sum(map(len, files.values()))
    return "\n".join([f"{owner}/{item.name} ({item.kind})", *lines, f"{total:>13,}  in {len(files)} files"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--owner", default=REPOSITORY.split("/")[-2], help="account or organisation on the hub")
    parser.add_argument("--data-set", type=Path, help="folder that `python -m recipes.shima_dataset` wrote")
    parser.add_argument("--upload", action="store_true", help="upload, instead of listing what would be uploaded")


def command(options: argparse.Namespace) -> None:
    """List or upload; CourseError where files and measured numbers disagree, or there is no token or network."""
    if not OWNER.fullmatch(options.owner):
        raise CourseError(f"{options.owner!r} is no account of the hub: give its name, such as ada.")
    items = [Item(name, folder, "model", ROOT / "LICENSE") for name, folder in MODEL_FOLDERS.items()]
    if options.data_set:
        items.append(Item("shima", options.data_set, "dataset", ROOT / "LICENSES" / "CC-BY-4.0.txt"))
    check(items)
    print("\n".join(listing(item, options.owner) for item in items))
    if not options.upload:
        print("Nothing was uploaded: the same with --upload publishes it.")
        return
    if get_token() is None:
        raise CourseError("There is no token for the hub: set HF_TOKEN, or run `hf auth login`.")
    if not hub_is_reachable():
        raise CourseError("The hub cannot be reached: connect to the network, and unset HF_HUB_OFFLINE.")
    publish(items, options.owner, HfApi())
