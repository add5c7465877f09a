"""House rules that ruff cannot state: where private torch names may stand, no hidden state, file sizes, docstrings.

Each rule is a function of a source text, tested on a text that breaks it, then run over every file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("dscompile", "passes", "codegen", "runtime", "tools")
COMPAT = tuple(f"dscompile/{part}_compat.py" for part in ("torch", "inductor", "cache", "cpp"))
REGISTRIES = {("dscompile/manager.py", "REGISTRY")}
"""The documented tables that are filled after import."""

SOURCES = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in (*PACKAGE, "benchmarks", "examples")
    for p in (ROOT / folder).rglob("*.py")
)
TESTS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py"))

MUTABLE_CALLS = {
    "list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "count", "local",
    "WeakKeyDictionary", "WeakValueDictionary", "WeakSet",
}  # fmt: skip
MUTATORS = {
    "append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault", "add", "discard", "sort",
    "reverse",
}  # fmt: skip


def private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def dotted(node: ast.expr) -> list[str]:
    """``a.b.c`` as its parts, or [] for anything that is not a plain chain of attributes."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def private_torch_names(source: str) -> list[str]:
    """``line: name`` of every private torch name. Operators (``torch.ops``) are the graph language, not internals."""
    tree = ast.parse(source)
    found: list[str] = []
    modules = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch" and any(map(private, alias.name.split("."))):
                    found.append(f"{node.lineno}: {alias.name}")
                if alias.asname and alias.name.split(".")[0] == "torch":
                    modules[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if any(map(private, name.split("."))):
                    found.append(f"{node.lineno}: {name}")
                modules[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (parts := dotted(node)) and parts[0] in modules:
            name = ".".join([modules[parts[0]], *parts[1:]])
            if private(parts[-1]) and not name.startswith("torch.ops."):
                found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.Call) and dotted(node.func)[-1:] in (["import_module"], ["__import__"]):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [
                f"{node.lineno}: {t}" for t in texts if t.startswith("torch.") and any(map(private, t.split(".")))
            ]
    return found


def globals_used(source: str) -> list[str]:
    return [
        f"{n.lineno}: global {', '.join(n.names)}" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Global)
    ]


def module_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run on import, those inside ``if``, ``try``, ``with`` and ``for`` included."""
    out: list[ast.stmt] = []
    for statement in body:
        out.append(statement)
        for field in ("body", "orelse", "finalbody"):
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                out += module_statements(getattr(statement, field, []))
    return out


def mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    return isinstance(value, ast.Call) and dotted(value.func)[-1:] != [] and dotted(value.func)[-1] in MUTABLE_CALLS


def module_tables(source: str) -> dict[str, int]:
    """Name and line of every mutable object that a module makes on import."""
    tables: dict[str, int] = {}
    for statement in module_statements(ast.parse(source).body):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and mutable(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            tables.update({t.id: statement.lineno for t in targets if isinstance(t, ast.Name) and t.id != "__all__"})
    return tables


def mutations(source: str) -> dict[str, int]:
    """Last part of every name or attribute that a text changes in place, with its line."""
    changed: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            targets = [node.func.value]
        for target in targets:
            if parts := dotted(target):
                changed[parts[-1]] = node.lineno
    return changed


def hidden_state(path: str, source: str, changed: set[str]) -> list[str]:
    """Module-level mutable objects that are neither a registry nor an UPPER_CASE table that nothing changes."""
    return [
        f"{line}: {name}"
        for name, line in module_tables(source).items()
        if (path, name) not in REGISTRIES and (not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name) or name in changed)
    ]


def read(path: str) -> str:
    return (ROOT / path).read_text()


@pytest.fixture(scope="module")
def changed() -> set[str]:
    """Every name that some source file changes in place."""
    return {name for path in SOURCES for name in mutations(read(path))}


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in COMPAT])
def test_private_torch_names_stand_only_in_the_compat_files(path: str) -> None:
    assert not private_torch_names(read(path)), f"{path}: re-export these from {COMPAT}"


@pytest.mark.parametrize("path", SOURCES)
def test_no_global_statement(path: str) -> None:
    assert not globals_used(read(path)), f"{path}: pass the object instead"


@pytest.mark.parametrize("path", SOURCES)
def test_no_module_level_state(path: str, changed: set[str]) -> None:
    assert not hidden_state(path, read(path), changed), f"{path}: mutable module-level state"


@pytest.mark.parametrize(("paths", "limit"), [(SOURCES, 600), (TESTS, 800)], ids=["sources", "tests"])
def test_files_are_short(paths: list[str], limit: int) -> None:
    lengths = {path: len(read(path).splitlines()) for path in paths}
    assert not {path: n for path, n in lengths.items() if n >= limit}


@pytest.mark.parametrize("path", [p for p in SOURCES if not private(Path(p).stem)])
def test_public_modules_say_what_they_are(path: str) -> None:
    assert ast.get_docstring(ast.parse(read(path))), f"{path}: no module docstring"


def test_every_folder_was_read() -> None:
    assert {path.split("/")[0] for path in SOURCES} >= set(PACKAGE)
    assert set(COMPAT) <= set(SOURCES)


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch.fx._lazy as lazy",
        "from torch._inductor import config",
        "from torch import _C",
        "from torch.utils import _pytree as pytree",
        "import torch\nx = torch._dynamo.reset()",
        "from torch import fx\ny = fx._compatibility",
        "import torch.utils as u\ny = u._pytree.tree_map",
        "import importlib\nimportlib.import_module('torch._guards')",
    ],
)
def test_finds_private_torch_names(source: str) -> None:
    assert private_torch_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.ops._c10d_functional.all_reduce.default",
        "import torch\nx = torch.__version__",
        "import torch\nx = torch.ops.aten._to_copy.default",
        "x = 'torch._dynamo'",
        "self._torch._x = 1",
    ],
)
def test_leaves_other_names_alone(source: str) -> None:
    assert not private_torch_names(source)


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("cache = {}", True),
        ("if 1:\n    seen: set[int] = set()", True),
        ("import collections\nC = collections.defaultdict(list)\nC['x'].append(1)\nC['x'] = 1", True),
        ("TABLE = {}\ndef f(): TABLE['x'] = 1", True),
        ("TABLE = []\ndef f(): TABLE.append(1)", True),
        ("TABLE: dict[str, int] = {'a': 1}\ndef f(): return TABLE['a']", False),
        ("__all__ = ['a']", False),
        ("def f():\n    seen = []\n    seen.append(1)", False),
    ],
)
def test_finds_hidden_state(source: str, bad: bool) -> None:
    assert bool(hidden_state("x.py", source, set(mutations(source)))) is bad


def test_finds_global() -> None:
    assert globals_used("def f():\n    global x\n    x = 1")
