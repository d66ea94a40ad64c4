"""What a release says about itself in several places is the same everywhere, and the licences are whole."""

import re
import tomllib
from datetime import date

import yaml

from helpers.profiles import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)


def test_project_citation_and_changelog_name_the_same_version_and_day() -> None:
    assert RELEASES, "CHANGELOG.md has no line such as: ## [0.1.0] - 2026-11-21"
    version, day = RELEASES[0]
    assert PROJECT["version"] == CITATION["version"] == version
    assert CITATION["date-released"] == date.fromisoformat(day)


def test_the_changelog_has_headings_of_its_format_only_newest_first_and_a_link_for_each() -> None:
    headings = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert headings == ["[Unreleased]", *(f"[{version}] - {day}" for version, day in RELEASES)]
    assert sorted(RELEASES, key=lambda r: tuple(map(int, r[0].split("."))), reverse=True) == RELEASES
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= kinds
    links = re.findall(r"^\[(.+)\]: https://\S+$", CHANGELOG, re.MULTILINE)
    assert links == ["Unreleased", *(version for version, _ in RELEASES)]


def test_the_citation_has_what_its_format_requires_and_the_projects_licences_and_address() -> None:
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert " AND ".join(CITATION["license"]) == PROJECT["license"]
    assert CITATION["repository-code"] == PROJECT["urls"]["repository"]


def test_the_licences_are_there_in_full() -> None:
    assert PROJECT["license-files"] == ["LICENSE", "LICENSES/CC-BY-4.0.txt"]
    mit, text = ((ROOT / name).read_text(encoding="utf-8") for name in PROJECT["license-files"])
    assert mit.startswith("MIT License\n") and "The LLM Workbook authors" in mit and len(mit.split()) > 160
    assert text.startswith("Attribution 4.0 International\n") and len(text) > 18_000
    assert [f"Section {number} --" in text for number in range(1, 9)] == 8 * [True]
