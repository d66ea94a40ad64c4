"""Finds the calls of libraries in Python sources and compares their arguments with the installed signatures.

Sources are only read: names are followed through imports, assignments, annotations and literal dicts, as far as that
is certain. A value that cannot be followed is left alone, so what is reported is wrong and what is not may be.
Where a callable takes **kwargs, `BEHIND` says what it does with them.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import peft
import transformers
from datasets.packaged_modules.text.text import TextConfig
from IPython.core.inputtransformer2 import TransformerManager
from torch import nn

from course import notebooks
from tests.support import notebook_structure as structure

LIBRARIES = ("trl", "peft", "transformers", "datasets", "bitsandbytes", "accelerate", "tokenizers")
FOLLOWED = (*LIBRARIES, "helpers")  # the types that helpers return are known too
UNKNOWN = object()

_MODEL = transformers.PreTrainedModel
_TOKENIZER = transformers.PreTrainedTokenizerBase
# Qualified name of a callable with **kwargs -> callables whose parameters it also takes, and names that it reads from
# its kwargs. A test looks for the names in the installed library, so that this list cannot outlive them.
BEHIND: dict[str, tuple[list[Callable], list[str]]] = {
    "_BaseAutoModelClass.from_pretrained": ([_MODEL.from_pretrained], ["trust_remote_code"]),
    "_BaseAutoModelClass.from_config": ([_MODEL._from_config], ["trust_remote_code"]),
    "PreTrainedModel.from_pretrained": (
        [],
        ["dtype", "device_map", "quantization_config", "attn_implementation", "subfolder", "output_loading_info"],
    ),
    "PreTrainedModel._from_config": ([], ["dtype", "attn_implementation"]),
    "AutoTokenizer.from_pretrained": ([_TOKENIZER.from_pretrained], ["model_max_length"]),
    "PreTrainedTokenizerBase.decode": ([transformers.TokenizersBackend._decode], []),
    "AutoConfig.from_pretrained": ([transformers.PreTrainedConfig.from_pretrained], ["trust_remote_code"]),
    "AutoConfig.for_model": ([transformers.LlamaConfig, transformers.MixtralConfig, transformers.Qwen3MoeConfig], []),
    "TokenizersBackend": ([], ["tokenizer_object", "eos_token", "pad_token", "extra_special_tokens"]),
    "load_dataset": ([TextConfig], []),
    "GenerationMixin.generate": ([transformers.GenerationConfig], ["attention_mask"]),
    "GenerationConfig": ([], list(vars(transformers.GenerationConfig()))),
}


@dataclass(frozen=True)
class Instance:
    """A value of which only the class is known."""

    of: type


@dataclass(frozen=True)
class Local:
    """A function of the source, of which only the annotation of its result is known."""

    returns: ast.expr | None


@dataclass
class Scope:
    """The names that a function or a whole file binds, and to what."""

    parent: "Scope | None" = None
    names: dict[str, list] = field(default_factory=dict)  # objects, or expressions yet to be followed
    busy: set[str] = field(default_factory=set)

    def bind(self, name: str, value: object) -> None:
        self.names.setdefault(name, []).append(value)

    def find(self, name: str) -> "Scope | None":
        return self if name in self.names else self.parent and self.parent.find(name)


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    calls: Counter = field(default_factory=Counter)  # checked calls by library
    keywords: int = 0


# Files


def read_sources(path: Path) -> Iterator[tuple[str, str]]:
    """The parts of a Python file or a notebook, each with a name to report; solutions are parts too."""
    if path.suffix == ".py":
        yield path.name, path.read_text(encoding="utf-8")
        return
    cells = notebooks.read_notebook(path).cells
    for number, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        yield f"{path.name} code cell {number}", TransformerManager().transform_cell(cell.source)
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            for block in structure.python_blocks(cell):
                yield f"{path.name} python block in cell {number}", block


def check_file(path: Path) -> Findings:
    """Check one file; the parts of a notebook share their names."""
    return check_sources(list(read_sources(path)))


def check_sources(parts: list[tuple[str, str]]) -> Findings:
    """Check sources that share their names, in pairs of what to call a part and its text."""
    findings, scope = Findings(), Scope()
    trees = [(where, ast.parse(source)) for where, source in parts]
    for where, tree in trees:
        _bind_all(tree.body, scope, where, findings)
    for where, tree in trees:
        for statement in tree.body:
            _visit(statement, scope, where, findings)
    findings.problems = list(dict.fromkeys(findings.problems))
    return findings


# Names


def _bind_all(statements: list[ast.stmt], scope: Scope, where: str, findings: Findings) -> None:
    """Bind what the statements assign, but not what functions in them do."""
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        match node:
            case ast.FunctionDef(name=name, returns=returns):
                scope.bind(name, Local(returns))
                continue
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                scope.bind(name, UNKNOWN)
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.split(".")[0] in FOLLOWED:
                        module = _import(alias.name, None, where, node, findings)
                        root = alias.name.split(".")[0]
                        scope.bind(alias.asname or root, module if alias.asname else importlib.import_module(root))
            case ast.ImportFrom(module=str(module), names=names, level=0) if module.split(".")[0] in FOLLOWED:
                for alias in names:
                    scope.bind(alias.asname or alias.name, _import(module, alias.name, where, node, findings))
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    _bind_target(target, value, scope)
            case ast.AnnAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                _bind_target(target, value, scope)
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                scope.bind(name, value)
            case ast.For(target=target) | ast.comprehension(target=target):
                _bind_target(target, None, scope)
            case ast.withitem(optional_vars=ast.expr() as target):
                _bind_target(target, None, scope)
            case ast.Lambda():
                continue
        if not isinstance(node, ast.ClassDef):
            pending.extend(ast.iter_child_nodes(node))


def _bind_target(target: ast.expr, value: ast.expr | None, scope: Scope) -> None:
    if isinstance(target, ast.Name):
        scope.bind(target.id, UNKNOWN if value is None else value)
    elif isinstance(target, (ast.Tuple, ast.List)):
        same = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
        for place, element in enumerate(target.elts):
            part = value.elts[place] if same else value and ast.Subscript(value=value, slice=ast.Constant(place))
            _bind_target(element, part, scope)


def _import(module: str, name: str | None, where: str, node: ast.stmt, findings: Findings) -> object:
    """The imported object; a problem is noted if there is none."""
    try:
        found = importlib.import_module(module)
        if name is None:
            return found
        return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")
    except ImportError:
        what = f"{module} has no {name}" if name else f"there is no module {module}"
        findings.problems.append(f"{where} line {node.lineno}: {what}")
        return UNKNOWN


# Values


def _resolve(node: object, scope: Scope) -> object:
    """The object that an expression stands for, an `Instance` of its class, or `UNKNOWN`."""
    match node:
        case ast.Name(id=name):
            home = scope.find(name)
            if home is None or name in home.busy:
                return UNKNOWN
            home.busy.add(name)
            try:
                values = [_resolve(value, home) for value in home.names[name]]
            finally:
                home.busy.discard(name)
            return values[0] if all(value == values[0] for value in values) else UNKNOWN
        case ast.Attribute(value=value, attr=attr):
            return _attribute(_resolve(value, scope), attr)
        case ast.Call(func=func, args=arguments):
            if ast.unparse(func) in ("copy.deepcopy", "deepcopy") and arguments:
                return _resolve(arguments[0], scope)
            return _result(_resolve(func, scope), func, scope)
        case ast.Subscript(value=value, slice=ast.Constant(value=int(place))):
            whole = _resolve(value, scope)
            if typing.get_origin(whole) is tuple and place < len(typing.get_args(whole)):
                return _instance(typing.get_args(whole)[place])
            return UNKNOWN
        case ast.AST():
            return UNKNOWN
    return node


def _attribute(owner: object, name: str) -> object:
    if owner is UNKNOWN or isinstance(owner, Local):
        return UNKNOWN
    if not isinstance(owner, Instance):
        return getattr(owner, name, UNKNOWN)
    found = inspect.getattr_static(owner.of, name, None)
    if isinstance(found, (classmethod, staticmethod)):
        return getattr(owner.of, name)
    return Method(owner, found) if inspect.isfunction(found) else UNKNOWN


@dataclass(frozen=True)
class Method:
    """A function called on an instance."""

    owner: Instance
    function: Callable


def _result(callee: object, func: ast.expr, scope: Scope) -> object:
    """What a call gives."""
    if isinstance(callee, Local):
        returned = _resolve(callee.returns, scope) if callee.returns else UNKNOWN
        return _instance(returned)
    if isinstance(callee, Method):
        # transformers overrides some of torch's methods, such as eval, without saying that they give the model back.
        declared = getattr(nn.Module, callee.function.__name__, callee.function)
        annotation = inspect.signature(declared).return_annotation
        own = isinstance(annotation, typing.TypeVar) or annotation in (typing.Self, "Self", "T")
        return callee.owner if own else UNKNOWN
    if inspect.isclass(callee):
        return _instance(callee)
    if callee is UNKNOWN or isinstance(callee, Instance) or not callable(callee):
        return UNKNOWN
    if inspect.ismethod(callee) and inspect.isclass(callee.__self__) and callee.__name__.startswith("from_"):
        auto = {"AutoConfig": transformers.PreTrainedConfig, "AutoTokenizer": _TOKENIZER}
        owner = callee.__self__
        if issubclass(owner, transformers.models.auto.auto_factory._BaseAutoModelClass):
            return Instance(_MODEL)
        return Instance(auto.get(owner.__name__, owner))
    if callee is peft.get_peft_model:
        return Instance(peft.PeftModel)
    try:
        returned = typing.get_type_hints(callee).get("return")
    except (NameError, TypeError, AttributeError):
        return UNKNOWN
    return returned if typing.get_origin(returned) is tuple else _instance(returned)


def _instance(found: object) -> object:
    library = inspect.isclass(found) and found.__module__.split(".")[0] in LIBRARIES
    return Instance(found) if library else UNKNOWN


# Calls


def _visit(node: ast.AST, scope: Scope, where: str, findings: Findings) -> None:
    """Check the calls in a node, functions with a scope of their own."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inner = Scope(scope)
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            inner.bind(argument.arg, _instance(_resolve(argument.annotation, scope)))
        for argument in (arguments.vararg, arguments.kwarg):
            if argument:
                inner.bind(argument.arg, UNKNOWN)
        body = node.body if isinstance(node.body, list) else [node.body]
        _bind_all(body, inner, where, findings)
        for child in [*body, *arguments.defaults, *getattr(node, "decorator_list", [])]:
            _visit(child, inner, where, findings)
        return
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, scope)
        if (inspect.ismodule(owner) or inspect.isclass(owner)) and _library(owner) and not _has(owner, node.attr):
            findings.problems.append(f"{where} line {node.lineno}: {owner.__name__} has no {node.attr}")
    if isinstance(node, ast.Call):
        _check_call(node, scope, where, findings)
    for child in ast.iter_child_nodes(node):
        _visit(child, scope, where, findings)


def _check_call(call: ast.Call, scope: Scope, where: str, findings: Findings) -> None:
    callee = _resolve(call.func, scope)
    if isinstance(callee, Instance):  # an object that is called
        forward = issubclass(callee.of, nn.Module) and callee.of.forward is not nn.Module.forward
        callee = Method(callee, callee.of.forward if forward else callee.of.__call__)
    if isinstance(callee, Method):
        name, bound, callee = f"{callee.owner.of.__name__}.{callee.function.__name__}", 1, callee.function
    else:
        name, bound = getattr(callee, "__qualname__", ""), 0
    if not callable(callee) or isinstance(callee, Local) or not (library := _library(callee)):
        return
    taken = parameters(callee)
    if taken is None:
        return
    findings.calls[library] += 1
    keywords = [key for keyword in call.keywords for key in _keys(keyword, scope)]
    findings.keywords += len(keywords)
    for keyword in keywords:
        place = f"{where} line {call.lineno}"
        if keyword not in taken.names:
            findings.problems.append(f"{place}: {name} does not take {keyword}")
        elif keyword in taken.deprecated:
            findings.problems.append(f"{place}: {name} takes {keyword} as deprecated")
    if not any(isinstance(argument, ast.Starred) for argument in call.args):
        most = taken.positional - bound
        if len(call.args) > most:
            findings.problems.append(
                f"{where} line {call.lineno}: {name} takes {most:.0f} positional arguments at most"
            )


def _keys(keyword: ast.keyword, scope: Scope) -> list[str]:
    """The name of a keyword, or those of a literal dict behind **."""
    return [keyword.arg] if keyword.arg else _literal_keys(keyword.value, scope)


def _literal_keys(node: object, scope: Scope) -> list[str]:
    match node:
        case ast.Dict(keys=keys, values=values):
            found = []
            for key, value in zip(keys, values, strict=True):
                if key is None:
                    found += _literal_keys(value, scope)
                elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                    found.append(key.value)
            return found
        case ast.Call(func=ast.Name(id="dict"), args=arguments, keywords=keywords):
            found = [key for argument in arguments for key in _literal_keys(argument, scope)]
            return found + [key for keyword in keywords for key in _keys(keyword, scope)]
        case ast.BinOp(left=first, op=ast.BitOr(), right=second) | ast.IfExp(body=first, orelse=second):
            return _literal_keys(first, scope) + _literal_keys(second, scope)
        case ast.Name(id=name):
            home = scope.find(name)
            if home is None or name in home.busy:
                return []
            home.busy.add(name)
            try:
                return [key for value in home.names[name] for key in _literal_keys(value, home)]
            finally:
                home.busy.discard(name)
    return []


# Signatures


@dataclass(frozen=True)
class Parameters:
    """What a callable takes."""

    names: frozenset[str]
    deprecated: frozenset[str]
    positional: float  # how many, with self


@cache
def parameters(callee: Callable) -> Parameters | None:
    """The parameters of the installed callable; None where nothing is known about its **kwargs."""
    try:
        signature = inspect.signature(callee)
    except ValueError:  # compiled, without a signature
        return None
    positional, names, open_ended = 0.0, set(), False
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional += 1
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.add(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            positional = float("inf")
        elif parameter.kind is parameter.VAR_KEYWORD:
            (unpacked,) = typing.get_args(parameter.annotation)[:1] or (None,)
            if typing.is_typeddict(unpacked):
                names |= unpacked.__annotations__.keys()
            else:
                open_ended = True
    deprecated = _deprecated(callee)
    names |= getattr(callee, "attribute_map", {}).keys()  # other names of a configuration's parameters
    if inspect.isclass(callee) and issubclass(callee, transformers.PreTrainedConfig):
        names.add("attn_implementation")  # its signature does not say so
    if open_ended:
        others, extra = BEHIND.get(callee.__qualname__, ([], []))
        names |= set(extra)
        for other in others:
            more = parameters(other)
            names, deprecated = names | more.names, deprecated | more.deprecated
            if inspect.signature(callee).parameters.keys() <= {"model_args", "kwargs"}:
                positional = max(positional, more.positional)
    return Parameters(frozenset(names), frozenset(deprecated), positional)


def _deprecated(callee: Callable) -> set[str]:
    """Parameters that a dataclass or a docstring calls deprecated."""
    found = set()
    if dataclasses.is_dataclass(callee):
        helps = {entry.name: str(entry.metadata.get("help", "")) for entry in dataclasses.fields(callee)}
        found |= {name for name, text in helps.items() if text.lower().startswith("deprecated")}
    entry = r"^ +`?(\w+)`? \((?:[^\n]*[Dd]eprecated|[^\n]*:\n +Deprecated)"
    return found | set(re.findall(entry, callee.__doc__ or "", re.MULTILINE))


def _library(found: object) -> str:
    """The library that an object is from, or nothing."""
    module = found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", None)
    if module is None:  # compiled methods know only their class
        module = getattr(getattr(found, "__objclass__", None), "__module__", "")
    root = str(module).split(".")[0]
    return root if root in LIBRARIES else ""


def _has(owner: types.ModuleType | type, name: str) -> bool:
    if hasattr(owner, name):
        return True
    if not inspect.ismodule(owner):
        return False
    try:
        importlib.import_module(f"{owner.__name__}.{name}")
    except ImportError:
        return False
    return True
