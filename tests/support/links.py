"""Links in the sources of the course, checked without a network: what they lead to is there, or well formed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token

from helpers.colab import REPOSITORY

MARKDOWN = MarkdownIt("commonmark").enable("table")
OF_THIS_REPOSITORY = re.compile(rf"{re.escape(REPOSITORY)}/(?:blob|tree|raw)/[^/]+/([^#?]+)")
ARXIV = re.compile(r"/(?:abs|pdf)/(?:\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+/\d{7})")
HOST = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,}")
PLACEHOLDER = re.compile(r"(?:^|\.)(?:example|test|invalid|localhost)(?:\.(?:com|org|net))?$")


@dataclass
class Document:
    """The addresses in a text and the names of its places."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class Tags(HTMLParser):
    """Collects addresses and names from HTML within Markdown."""

    def __init__(self, document: Document):
        """Collect into the document."""
        super().__init__()
        self.document = document

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keep what leads somewhere, and what can be led to."""
        for name, value in attributes:
            if name in ("href", "src"):
                self.document.links.append(value or "")
            elif name in ("id", "name"):
                self.document.anchors.add(value or "")


def slug(heading: str) -> str:
    """The name of a heading's place, as GitHub and the book make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def read_markdown(texts: list[str]) -> Document:
    """The links and places of one document, which may be in parts, as a notebook's is."""
    document = Document()
    tags = Tags(document)

    def take(tokens: list[Token]) -> None:
        for i, token in enumerate(tokens):
            if token.type in ("link_open", "image"):
                document.links.append(str(token.attrGet("href" if token.type == "link_open" else "src")))
            elif token.type in ("html_block", "html_inline"):
                tags.feed(token.content)
            elif token.type == "heading_open":
                inline = tokens[i + 1].children or []
                name = slug("".join(part.content for part in inline if part.type in ("text", "code_inline")))
                again = sum(
                    anchor == name or re.fullmatch(rf"{re.escape(name)}-\d+", anchor) is not None
                    for anchor in document.anchors
                )
                document.anchors.add(f"{name}-{again}" if again else name)
            take(token.children or [])

    for text in texts:
        take(MARKDOWN.parse(text))
    return document


@cache
def read(path: Path) -> Document:
    """The links and places of a Markdown file or a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        return read_markdown([cell.source for cell in cells if cell.cell_type == "markdown"])
    return read_markdown([re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)])


def problems(path: Path, root: Path, hosts: frozenset[str]) -> Iterator[str]:
    """What is wrong with each link of the file; `hosts` are those that links may lead to."""
    for link in read(path).links:
        if wrong := within(link, path, root) if is_relative(link) else outside(link, root, hosts):
            yield f"{path.relative_to(root)}: {link or 'a link to nothing'}: {wrong}"


def is_relative(link: str) -> bool:
    """Whether the link leads to a file or place of the repository."""
    parts = urlsplit(link)
    return not parts.scheme and not parts.netloc


def within(link: str, path: Path, root: Path) -> str | None:
    """What is wrong with a link within the repository."""
    parts = urlsplit(link)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not link:
        return "it is empty"
    if not target.is_relative_to(root) or not target.exists():
        return "there is no such file"
    if parts.fragment and target.suffix in (".md", ".ipynb") and unquote(parts.fragment) not in read(target).anchors:
        return "there is no such heading"
    return None


def outside(link: str, root: Path, hosts: frozenset[str]) -> str | None:
    """What is wrong with a link to another server, as far as its text tells."""
    parts = urlsplit(link)
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http") or re.search(r"\s", link) or not HOST.fullmatch(host):
        return "it is no address"
    if PLACEHOLDER.search(host):
        return "its host is a placeholder"
    if host not in hosts:
        return f"{host} is not among the hosts in tests/repository/test_links.py: correct it, or add it"
    if host == "arxiv.org" and not ARXIV.fullmatch(parts.path):
        return "arXiv has no such address"
    if (file := OF_THIS_REPOSITORY.match(link)) and not (root / unquote(file[1])).exists():
        return "the repository has no such file"
    return None
