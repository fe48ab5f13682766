"""Which module imports which, read from the syntax trees, and the directions that are allowed."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from tests.house.tree import Tree, Violation

_TOP_PACKAGES = ("backend", "client", "kernels", "tests")
_IMPORT_FUNCTIONS = ("import_module", "__import__", "importorskip")


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name; `typing_only` if it stands under `if TYPE_CHECKING`."""

    module: str
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Direction:
    """What the files that match `importers` (and none of `but`) may import.

    `*` in a pattern also spans folders. `never` lists modules with all below them; `only`, when given, lists the sole
    modules of this project that are allowed. `through` follows imports of imports.
    """

    importers: tuple[str, ...]
    remedy: str
    but: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    through: bool = False

    def covers(self, path: str) -> bool:
        return _matches(path, self.importers) and not _matches(path, self.but)

    def forbids(self, module: str) -> bool:
        outside = self.only is not None and _within(module, _TOP_PACKAGES) and not _within(module, self.only)
        return outside or _within(module, self.never)


DIRECTIONS = (
    Direction(
        importers=("backend/engine/scheduler.py",),
        only=("backend.engine", "backend.errors"),
        never=("backend.engine.engine", "backend.engine.process", "torch", "tritonclient", "tiktoken"),
        through=True,
        remedy="the scheduler is Python and NumPy and knows sequences, plans and pages only: pass the value in",
    ),
    Direction(
        importers=("*",),
        but=("backend/triton_adapter*", "tests/*"),
        never=("triton_python_backend_utils",),
        remedy="only backend/triton_adapter speaks to Triton's stub: move the call there",
    ),
    Direction(
        importers=("model_repository/*", "backend/model.py"),
        only=("backend.triton_adapter",),
        remedy="what Triton loads is a dozen lines that call backend.triton_adapter",
    ),
    Direction(
        importers=("*",),
        but=("model_repository/*", "backend/model.py", "backend/triton_adapter*", "tests/*"),
        never=("backend.triton_adapter",),
        remedy="nothing below the adapter knows of it: move what is shared to text, engine or settings",
    ),
    Direction(
        importers=("backend/triton_adapter*",),
        never=("torch", "backend.runner", "kernels"),
        through=True,
        remedy="the stub's process loads no engine: talk to it through backend.engine's process handle",
    ),
    Direction(
        importers=("backend/runner/*",),
        only=(
            "backend.runner",
            "backend.checkpoint",
            "backend.engine.plan",
            "backend.engine.request",
            "backend.errors",
            "backend.phases",
            "backend.settings",
            "kernels",
        ),
        remedy="a runner gets StepPlans, and builds on checkpoint and kernels only",
    ),
    Direction(
        importers=("backend/engine/*",),
        but=("backend/engine/engine.py", "backend/engine/process.py"),
        never=("backend.runner", "kernels", "torch"),
        remedy="only the engine loop and its process know runners",
    ),
    Direction(
        importers=("backend/engine/*",),
        never=("backend.text",),
        remedy="the engine knows the bytes of every id and nothing more of the tokenizer",
    ),
    Direction(
        importers=("backend/text/*",),
        only=("backend.text", "backend.checkpoint", "backend.errors"),
        never=("torch",),
        remedy="text builds on checkpoint only",
    ),
    Direction(
        importers=("backend/checkpoint/*",),
        only=("backend.checkpoint", "backend.errors"),
        remedy="readers of checkpoints build on nothing else of the project",
    ),
    Direction(
        importers=("kernels/*",),
        only=("kernels",),
        remedy="kernels stand alone: pass what they need as arguments",
    ),
    Direction(
        importers=("client/*",),
        only=("client",),
        never=("torch",),
        remedy="the client knows the server by its protocol only",
    ),
    Direction(
        importers=("client/*",),
        but=("client/gateway/*",),
        never=("client.gateway", "fastapi", "pydantic", "orjson"),
        remedy="the library needs tritonclient alone: what serves HTTP belongs to the gateway",
    ),
    Direction(
        importers=("*",),
        but=("tests/*",),
        never=("transformers", "tokenizers", "tests"),
        remedy="this belongs to tests, as an oracle",
    ),
    Direction(
        importers=("*",),
        never=("model", "config"),
        remedy="the stub's sys.path holds backend folders too, so this may be another file: name it in full",
    ),
)


def module_name(path: str) -> str:
    """Dotted name of a Python file; a package goes by its folder.

    >>> module_name("backend/engine/plan.py"), module_name("backend/engine/__init__.py")
    ('backend.engine.plan', 'backend.engine')
    """
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(tree: Tree) -> dict[str, list[Import]]:
    """Imports of every Python file, those inside functions and by `import_module("...")` included."""
    modules = {module_name(path) for path in tree.python_files()}
    return {path: list(_imports(tree, path, modules)) for path in tree.python_files()}


def wrong_directions(tree: Tree, directions: tuple[Direction, ...] = DIRECTIONS) -> list[Violation]:
    """Every import that some direction forbids."""
    imports = read_imports(tree)
    return [
        found
        for direction in directions
        for path in imports
        if direction.covers(path)
        for found in _forbidden(direction, path, imports)
    ]


def import_cycles(tree: Tree) -> list[Violation]:
    """The first circle of imports, if there is one; imports for type checking only do not count."""
    imports = read_imports(tree)
    paths = {module_name(path): path for path in imports}
    graph = {
        module_name(path): {found.module for found in imports[path] if not found.typing_only and found.module in paths}
        - {module_name(path)}
        for path in imports
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1][::-1]
        line = next(found.line for found in imports[paths[circle[0]]] if found.module == circle[1])
        problem = f"imports in a circle: {' -> '.join(circle)}"
        return [Violation(paths[circle[0]], line, problem, "move what both need into a module below them")]
    return []


def _imports(tree: Tree, path: str, modules: set[str]) -> Iterator[Import]:
    syntax = ast.parse(tree.text(path), filename=path)
    typing_only = {
        id(inner)
        for node in ast.walk(syntax)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(syntax):
        for name in _imported_names(node, path, modules):
            yield Import(name, getattr(node, "lineno", 1), id(node) in typing_only)


def _imported_names(node: ast.AST, path: str, modules: set[str]) -> list[str]:
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(module=module, names=aliases, level=level):
            above = PurePosixPath(path).parts[:-level] if level else ()
            origin = ".".join([*above, *([module] if module else [])])
            # `from package import name`: a submodule when there is one of that name, else something of the package.
            return [full if (full := f"{origin}.{alias.name}") in modules else origin for alias in aliases]
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            return [name] if called in _IMPORT_FUNCTIONS else []
        case _:
            return []


def _forbidden(direction: Direction, start: str, imports: dict[str, list[Import]]) -> Iterator[Violation]:
    paths = {module_name(path): path for path in imports}
    ways = {start: module_name(start)}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        for found in imports[path]:
            if direction.forbids(found.module):
                way = f" (reached by {ways[path]})" if path != start else ""
                yield Violation(path, found.line, f"imports {found.module}{way}", direction.remedy)
            elif direction.through and (next_path := paths.get(found.module)) is not None and next_path not in ways:
                ways[next_path] = f"{ways[path]} -> {found.module}"
                waiting.append(next_path)


def _within(module: str, tops: tuple[str, ...]) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in tops)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
