"""Finds the claims of a lesson that depend on what its training gave: used by tests/test_learning.py.

A name depends on training if a statement that trains, or that uses such a name, assigns or fills it. That is read
from the sources and says that a claim looks at the outcome, not that it would fail without one.
"""

import ast

from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode


def learning_claims(notebook: NotebookNode) -> tuple[bool, list[NotebookNode]]:
    """Whether the notebook trains, and its cells with a claim or an assertion about the outcome."""
    functions: set[str] = set()  # that train, or read what training gave
    outcome: set[str] = set()
    found, does_train = [], False
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for statement in ast.parse(TransformerManager().transform_cell(cell.source)).body:
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            learns = _trains(statement) or bool(used & (functions | outcome))
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                if learns:
                    functions.add(statement.name)
                continue
            if learns:
                does_train = True
                outcome |= _changed(statement, functions)
            if any(_names(test) & (outcome | functions) for test in _tests(statement)) and cell not in found:
                found.append(cell)
    return does_train, found


def _trains(node: ast.AST) -> bool:
    """Whether there is a call of a training loop, a trainer or an optimiser's step in it."""
    for call in ast.walk(node):
        match call:
            case ast.Call(func=ast.Name(id="train")):
                return True
            case ast.Call(func=ast.Attribute(value=owner, attr="train" | "step" as name)):
                if {"train": "trainer", "step": "optim"}[name] in ast.unparse(owner).lower():
                    return True
    return False


def _changed(statement: ast.stmt, functions: set[str]) -> set[str]:
    """Names that the statement assigns, fills by index or method, or hands to what trains: it works in place."""
    changed = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            changed.add(node.id)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            changed |= _names(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed |= {node.func.value.id} if isinstance(node.func.value, ast.Name) else set()
        if isinstance(node, ast.Call) and (_trains(node) or ast.unparse(node.func) in functions):
            changed |= {name.id for name in node.args if isinstance(name, ast.Name)}
    return changed


def _tests(statement: ast.stmt) -> list[ast.expr]:
    """The conditions of claims and assertions in the statement."""
    found: list[ast.expr] = []
    for node in ast.walk(statement):
        match node:
            case ast.Assert(test=test):
                found.append(test)
            case ast.Call(func=ast.Name(id="claim"), args=[_, test, *_]):
                found.append(test)
    return found


def _names(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
