"""What the teacher's page of a lesson says, for the speaker notes: minutes of each section, and words for each plot."""

import ast
import re
from dataclasses import dataclass, field

from nbformat import NotebookNode

from helpers.profiles import ROOT

FOLDER = ROOT / "docs" / "teaching"


@dataclass
class Teaching:
    """The minutes by the section's title, and what to say by the plot's title; both are markdown."""

    minutes: dict[str, str] = field(default_factory=dict)
    plots: dict[str, str] = field(default_factory=dict)

    def said(self, cell: NotebookNode) -> str:
        """What to say at the plots of a code cell; empty if the page has nothing on them."""
        try:
            patterns = titles_of(cell.source)
        except SyntaxError:  # a magic
            return ""
        return "\n\n".join(text for title, text in self.plots.items() if any(p.fullmatch(title) for p in patterns))


def read_teaching(stem: str) -> Teaching:
    """What docs/teaching/NN_name.md says about a lesson; nothing if there is no such page."""
    path = FOLDER / f"{stem}.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (.+?) \|$", text, re.MULTILINE)
    plots = re.findall(r'^- \*\*"(.+?)"\*\*: (.+?)(?=^- |^#|\Z)', text, re.DOTALL | re.MULTILINE)
    return Teaching(
        {title: f"{number} minutes. If time is short: {short}." for title, number, short in rows},
        {title: " ".join(said.split()) for title, said in plots},
    )


def titles_of(source: str) -> list[re.Pattern]:
    """Patterns of the titles of a cell's plots; what an f-string fills in may be anything."""
    given = []
    for node in ast.walk(ast.parse(source)):
        names = [getattr(target, "id", "") for target in node.targets] if isinstance(node, ast.Assign) else []
        if "title" in names or (isinstance(node, ast.keyword) and node.arg == "title"):
            given.append(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("set_title", "suptitle"):
            given.append(node.args[0])
    patterns = []
    for value in given:
        if isinstance(value, ast.JoinedStr):
            pieces = [re.escape(v.value) if isinstance(v, ast.Constant) else ".+" for v in value.values]
            patterns.append(re.compile("".join(pieces)))
        elif isinstance(value, ast.Constant):
            patterns.append(re.compile(re.escape(value.value)))
        else:  # it has a name: any text of the cell may be meant
            texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
            patterns += [re.compile(re.escape(text)) for text in texts if isinstance(text, str)]
    return patterns
