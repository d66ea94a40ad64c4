"""Every link in README, documents, cards and lessons leads to something that is there, or is a well-formed address.

No server is asked. The links of the built book, and those in the pages of site/, are checked in tests/site.
"""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.colab import REPOSITORY
from helpers.profiles import ROOT
from tests.support.links import problems, read, read_markdown, slug

# A link to another server leads to one of these: a new one is added on purpose, and a misspelt one is found.
HOSTS = frozenset(
    {
        "arxiv.org",
        "colab.research.google.com",
        "github.com",
        "huggingface.co",
        "iclr-blogposts.github.io",
        "joschu.net",
        "kaggle.com",
        "keepachangelog.com",
        "semver.org",
    }
)
PATTERNS = ("*.md", "docs/**/*.md", "data/**/README.md", "notebooks/*.ipynb")
SOURCES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_something_that_is_there_or_is_a_well_formed_address(path):
    assert list(problems(path, ROOT, HOSTS)) == []


def test_the_links_are_found_and_no_host_is_listed_in_vain():
    links = [link for path in SOURCES for link in read(path).links]
    assert len(links) > 100
    assert [host for host in HOSTS if not any(f"//{host}/" in link for link in links)] == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A course of two documents and a notebook, all of whose links are right."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# The course\n\n[a](docs/a.md) [there](docs/a.md#a-part-of-it) [lesson](lesson.ipynb#first-1)\n"
        "[up](#the-course)\n"
        f"[paper](https://arxiv.org/abs/1706.03762) [file]({REPOSITORY}/blob/v1/docs/a.md)\n"
    )
    (tmp_path / "docs" / "a.md").write_text(
        '---\nlicense: mit\n---\n\n## A *part* of `it`\n\n<a href="../README.md">up</a>\n'
    )
    cells = [new_markdown_cell("## First"), new_code_cell("'[x](y)'"), new_markdown_cell("## First\n\n[a](docs/a.md)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "lesson.ipynb")
    return tmp_path


def found(folder: Path) -> list[str]:
    return [
        wrong for name in ("README.md", "docs/a.md", "lesson.ipynb") for wrong in problems(folder / name, folder, HOSTS)
    ]


def test_right_links_are_left_alone(folder):
    assert found(folder) == []


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("b.md", "there is no such file"),
        ("../../outside.md", "there is no such file"),
        ("a.md#another-part", "there is no such heading"),
        ("../lesson.ipynb#first-2", "there is no such heading"),
        ("#nowhere", "there is no such heading"),
        ("", "it is empty"),
        ("https://", "it is no address"),
        ("https:///abs/1706.03762", "it is no address"),
        ("ftp://arxiv.org/abs/1706.03762", "it is no address"),
        ("https://example.com/page", "its host is a placeholder"),
        ("https://arxiv.org/abs/170603762", "arXiv has no such address"),
        ("https://arxvi.org/abs/1706.03762", "arxvi.org is not among the hosts"),
        (f"{REPOSITORY}/blob/v1/docs/b.md", "the repository has no such file"),
    ],
)
@pytest.mark.parametrize("form", ["[x]({})", "![x]({})", '<img alt="x" src="{}">', "[x][1]\n\n[1]: {}"])
def test_a_planted_wrong_link_is_found_and_named(folder, form, link, said):
    text = form.format(link or "<>" if "[" in form else link)
    (folder / "docs" / "a.md").write_text(f"# A part of it\n\n{text}\n")
    (wrong,) = [problem for problem in found(folder) if problem.startswith("docs/a.md")]
    assert said in wrong


def test_places_have_the_names_that_github_gives_them():
    assert slug("3 · What it's worth: `x_1`, and more") == "3--what-its-worth-x_1-and-more"
    document = read_markdown(["# Same\n\n# Same\n\n<a id='here'></a>", "# Same"])
    assert document.anchors == {"same", "same-1", "same-2", "here"}
