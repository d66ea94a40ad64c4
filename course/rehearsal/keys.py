"""What a row of the report depends on: the code of a lesson, as one profile runs it.

Text does not count: markdown, comments, docstrings, layout, where a cell ends, and words only printed or drawn.
Nor do the setup cell and the other profiles' entries in a table of settings. A change of `helpers` leaves the key as it
is, too: the runner sees that, and rehearses the lesson again when it is asked to.
"""

import ast
import hashlib
import json
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from course.notebooks import code_cells, tags
from helpers.profiles import PROFILES

# Functions and methods whose words are for people.
TELL = {"print", "claim", "equal", "report", "show", "show_table", "dots", "set", "set_title", "suptitle", "annotate",
        "set_xlabel", "set_ylabel", "text", "legend", "curve", "bars_with_intervals", "pareto", "expect_close",
        "expect_equal", "expect_shape", "expect_true"}  # fmt: skip
EMPTY = (None, [], ())


def code_key(notebook: Path, profile: str) -> str:
    """The same for two notebooks whose cells do the same on this profile."""
    transform = TransformerManager().transform_cell
    cells = [cell.source for cell in code_cells(notebook) if "setup" not in tags(cell)]
    trees = [_Reduced(profile).visit(ast.parse(transform(source))) for source in cells]
    plain = [_plain(statement) for tree in trees for statement in tree.body]  # where a cell ends does not count
    return hashlib.sha256(json.dumps([profile, plain]).encode()).hexdigest()


class _Reduced(ast.NodeTransformer):
    """Leaves out of a cell what does not count."""

    def __init__(self, profile: str) -> None:
        """For this profile."""
        self.others = {name for name in PROFILES if name != profile}

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """A bare string is a docstring."""
        self.generic_visit(node)
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        """A table of settings by profile keeps its own row."""
        self.generic_visit(node)
        names = {key.value if isinstance(key, ast.Constant) else None for key in node.keys}
        if names and names <= PROFILES.keys():
            kept = [pair for pair in zip(node.keys, node.values, strict=True) if pair[0].value not in self.others]
            node.keys, node.values = [key for key, _ in kept], [value for _, value in kept]
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """What is only told has no words."""
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in TELL:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value = ""
        return node


def _plain(node: object) -> object:
    """A tree as lists, the same in every version of Python that reads it."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in EMPTY and name != "ctx"]
    return [type(node).__name__, *([name, _plain(value)] for name, value in fields)]
