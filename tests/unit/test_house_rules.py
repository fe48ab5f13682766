"""The house rules hold for the project, and each rule finds a violation that was planted for it."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.house.dependencies import stale_locks, undeclared_imports
from tests.house.imports import DIRECTIONS, import_cycles, module_name, wrong_directions
from tests.house.links import broken_links, heading_anchor
from tests.house.readmes import MAX_PYTHON_LINES, long_files, missing_lines
from tests.house.tree import Tree, Violation, planted_tree, project_tree

ROOT = Path(__file__).resolve().parents[2]

PYPROJECT = """
[project]
name = "demo"
[project.optional-dependencies]
client = ["numpy==1.26.4"]
server = ["demo[client]", "torch==2.13.0"]
tests = ["demo[server]", "pytest==9.2.0"]
"""
LOCKED_NUMPY = "# made by a tool\nnumpy==1.26.4 \\\n    --hash=sha256:aa\n"
LOCKED = {
    "pyproject.toml": PYPROJECT,
    "Makefile": "TORCH ?= torch==2.13.0\n",
    "requirements/client.txt": LOCKED_NUMPY,
    "requirements/server.txt": LOCKED_NUMPY,
    "requirements/tests.txt": LOCKED_NUMPY + "pytest==9.2.0 \\\n    --hash=sha256:bb\n",
}


@pytest.fixture(scope="module")
def project() -> Tree:
    return project_tree(ROOT)


def test_imports_go_in_the_allowed_directions(project: Tree) -> None:
    assert_none(wrong_directions(project))


def test_no_direction_speaks_of_files_that_are_gone(project: Tree) -> None:
    patterns = {pattern for direction in DIRECTIONS for pattern in (*direction.importers, *direction.but)}
    python_files = project.python_files()
    assert {pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in python_files)} == set()


def test_no_modules_import_each_other_in_a_circle(project: Tree) -> None:
    assert_none(import_cycles(project))


def test_every_imported_package_is_pinned(project: Tree) -> None:
    assert_none(undeclared_imports(project))


def test_lock_files_hold_the_pins(project: Tree) -> None:
    assert_none(stale_locks(project))


def test_links_lead_somewhere(project: Tree) -> None:
    assert_none(broken_links(project))


def test_every_file_has_its_line_in_a_readme(project: Tree) -> None:
    assert_none(missing_lines(project))


def test_no_file_is_too_long_to_read(project: Tree) -> None:
    assert_none(long_files(project))


@pytest.mark.parametrize(
    ("path", "text", "imported"),
    [
        ("backend/engine/scheduler.py", "import torch\n", "torch"),
        ("backend/engine/scheduler.py", "from backend.runner import model_runner\n", "backend.runner"),
        ("backend/engine/scheduler.py", "def late() -> None:\n    import kernels.norm\n", "kernels.norm"),
        ("backend/engine/scheduler.py", "from backend.settings import Settings\n", "backend.settings"),
        ("backend/engine/sequence.py", "import torch.nn\n", "torch.nn"),
        ("backend/engine/sequence.py", "from ..text import chat\n", "backend.text"),
        (
            "backend/engine/process.py",
            "import triton_python_backend_utils as pb_utils\n",
            "triton_python_backend_utils",
        ),
        ("backend/engine/messages.py", "from backend.runner.batch import Batch\n", "backend.runner.batch"),
        ("backend/model.py", "from backend.engine import process\n", "backend.engine"),
        ("model_repository/ensemble/1/model.py", "from backend.text import chat\n", "backend.text"),
        ("backend/text/chat.py", "from backend.engine.plan import StepPlan\n", "backend.engine.plan"),
        ("backend/text/chat.py", "import backend.triton_adapter.tensors\n", "backend.triton_adapter.tensors"),
        ("backend/checkpoint/config.py", "import backend.runner\n", "backend.runner"),
        ("backend/runner/batch.py", "from backend.engine.scheduler import Scheduler\n", "backend.engine.scheduler"),
        ("backend/runner/batch.py", "import importlib\nimportlib.import_module('transformers')\n", "transformers"),
        ("backend/triton_adapter/tensors.py", "import torch\n", "torch"),
        ("client/chat.py", "from backend.errors import NemoError\n", "backend.errors"),
        ("kernels/norm.py", "import backend\n", "backend"),
        ("backend/serve.py", "from tests import demo\n", "tests"),
        ("backend/serve.py", "import model\n", "model"),
        ("backend/serve.py", "from backend.triton_adapter import tensors\n", "backend.triton_adapter"),
    ],
)
def test_forbidden_import_is_found(tmp_path: Path, path: str, text: str, imported: str) -> None:
    tree = planted_tree(tmp_path, {path: text})
    line = len(text.splitlines())
    assert {(found.path, found.line, found.problem) for found in wrong_directions(tree)} == {
        (path, line, f"imports {imported}")
    }


def test_scheduler_may_not_reach_torch_through_another_module(tmp_path: Path) -> None:
    tree = planted_tree(
        tmp_path,
        {
            "backend/engine/scheduler.py": "from backend.engine import plan\n",
            "backend/engine/plan.py": "from backend.errors import NemoError\n",
            "backend/errors.py": '"""Errors."""\nimport torch\n',
        },
    )
    (found,) = wrong_directions(tree)
    way = "backend.engine.scheduler -> backend.engine.plan -> backend.errors"
    assert str(found).startswith(
        f"backend/errors.py:2: imports torch (reached by {way}); the scheduler is Python and NumPy"
    )


def test_allowed_imports_are_left_alone(tmp_path: Path) -> None:
    tree = planted_tree(
        tmp_path,
        {
            "backend/model.py": "from backend.triton_adapter import engine_model\n",
            "backend/triton_adapter/__init__.py": "",
            "backend/triton_adapter/engine_model.py": "import triton_python_backend_utils\nimport backend.text.chat\n",
            "backend/text/chat.py": "import mistral_common\nfrom backend.checkpoint.vocabulary import Vocabulary\n",
            "backend/runner/batch.py": "import torch\nfrom backend.engine.plan import StepPlan\nimport kernels.norm\n",
            "backend/engine/process.py": "from backend.runner.select import make_runner\n",
            "client/chat.py": "from client import response\nimport tritonclient.grpc\n",
            "tests/oracle.py": "import transformers\nfrom backend.runner import batch\n",
        },
    )
    assert wrong_directions(tree) == []


def test_circle_is_found(tmp_path: Path) -> None:
    circle = {
        "client/response.py": "import json\nfrom client.errors import ClientError\n",
        "client/errors.py": "def late() -> None:\n    from client import meter\n",
        "client/meter.py": "from client.response import Response\n",
    }
    (found,) = import_cycles(planted_tree(tmp_path, circle))
    assert found.line == 2 if found.path != "client/meter.py" else 1
    assert found.problem.count("->") == 3
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from client.response import Response\n"
    assert import_cycles(planted_tree(tmp_path, {**circle, "client/meter.py": typing_only})) == []


def test_module_names() -> None:
    assert module_name("backend/engine/plan.py") == "backend.engine.plan"
    assert module_name("backend/engine/__init__.py") == "backend.engine"


def test_undeclared_package_is_found(tmp_path: Path) -> None:
    sources = {
        "backend/a.py": "import json\nimport numpy\nimport torch\n",
        "client/b.py": "import numpy\nimport torch\n",
    }
    (found,) = undeclared_imports(planted_tree(tmp_path, {**LOCKED, **sources}))
    assert (found.path, found.line, found.problem) == (
        "client/b.py",
        2,
        "imports torch, which no pin of client provides",
    )


def test_locks_that_agree_are_left_alone(tmp_path: Path) -> None:
    assert stale_locks(planted_tree(tmp_path, LOCKED)) == []


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("requirements/client.txt", LOCKED_NUMPY.replace("1.26.4", "2.0"), "numpy==1.26.4 is pinned, the lock has 2.0"),
        ("requirements/tests.txt", LOCKED_NUMPY, "pytest==9.2.0 is pinned, the lock has None"),
        ("requirements/client.txt", "numpy==1.26.4\n", "numpy without hash"),
        ("requirements/client.txt", "numpy==1.26.4 \\\nx==1 \\\n    --hash=sha256:a\n", "numpy without hash"),
        ("requirements/client.txt", f"--find-links wheels\n{LOCKED_NUMPY}", "unexpected: --find-links wheels"),
        ("requirements/client.txt", f"{LOCKED_NUMPY}torch==2.13.0 \\\n    --hash=sha256:cc\n", "torch is locked"),
        ("Makefile", "TORCH ?= torch==2.0.0\n", "TORCH is not pyproject.toml's pin"),
    ],
)
def test_stale_lock_is_found(tmp_path: Path, path: str, text: str, problem: str) -> None:
    (found,) = stale_locks(planted_tree(tmp_path, {**LOCKED, path: text}))
    assert (found.path, found.problem) == (path, problem)


def test_range_instead_of_a_pin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extra client: 'numpy>=1' is not an exact pin"):
        stale_locks(
            planted_tree(tmp_path, {**LOCKED, "pyproject.toml": PYPROJECT.replace("numpy==1.26.4", "numpy>=1")})
        )


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("missing.md", "link to missing.md, which is not there"),
        ("../../outside.md", "link to ../../outside.md, which is not there"),
        ("#nowhere", "link to #nowhere: no such heading"),
        ("other.md#nowhere", "link to other.md#nowhere: no such heading"),
    ],
)
def test_broken_link_is_found(tmp_path: Path, link: str, problem: str) -> None:
    text = f"# Title\n\nFirst line,\nthen [a link]({link}).\n"
    pages = {"docs/page.md": text, "docs/other.md": "# There\n", "outside.md": ""}
    (found,) = broken_links(planted_tree(tmp_path, pages))
    assert (found.path, found.line, found.problem) == ("docs/page.md", 4, problem)


def test_good_links_are_left_alone(tmp_path: Path) -> None:
    links = (
        "other.md",
        "other.md#its-name-in-code",
        "#twice-1",
        "..",
        "/docs/other.md",
        "https://example.org/x",
        "#by-hand",
    )
    text = "# Twice\n\n# Twice\n\n" + "\n".join(f"[x]({link})" for link in links) + '\n\n<a id="by-hand"></a>\n'
    tree = planted_tree(tmp_path, {"docs/page.md": text, "docs/other.md": "# Its `name` in code\n", "code.py": ""})
    assert broken_links(tree) == []
    assert heading_anchor("What works, and what doesn't (yet)") == "what-works-and-what-doesnt-yet"


@pytest.mark.parametrize(
    ("files", "path", "problem"),
    [
        ({"a/README.md": "- `b.py`: is c.py.txt", "a/b.py": "", "a/c.py": ""}, "a/README.md", "no line names a/c.py"),
        ({"README.md": "a/ is code", "a/b.py": ""}, "a", "folder without README.md"),
        ({"README.md": "code", "data/b.bin": ""}, "README.md", "no line names data/b.bin"),
        ({"data/b.bin": ""}, "data/b.bin", "no README.md beside it or above it"),
        ({"README.md": "\n| `gone.py` | old |\n"}, "README.md", "names gone.py, which is not there"),
        ({"model_repository/README.md": "", "model_repository/e/1/model.py": ""}, "model_repository/README.md", ""),
    ],
)
def test_missing_readme_line_is_found(tmp_path: Path, files: dict[str, str], path: str, problem: str) -> None:
    (found,) = missing_lines(planted_tree(tmp_path, files))
    assert found.path == path
    assert problem in found.problem


def test_complete_readmes_are_left_alone(tmp_path: Path) -> None:
    tree = planted_tree(
        tmp_path,
        {
            "README.md": "- `data/`: numbers\n- [`Makefile`](Makefile): commands\n- `model_repository`: see its README",
            "Makefile": "",
            ".gitignore": "",
            "data/deep/b.bin": "",
            "a/README.md": "- `b.py`: what it is",
            "a/b.py": "",
            "a/__init__.py": "",
            "model_repository/README.md": "- `e/config.pbtxt`, `e/1/model.py`: e",
            "model_repository/e/config.pbtxt": "",
            "model_repository/e/1/model.py": "",
        },
    )
    assert missing_lines(tree) == []


def test_long_file_is_found(tmp_path: Path) -> None:
    tree = planted_tree(
        tmp_path, {"long.py": "x = 1\n" * (MAX_PYTHON_LINES + 1), "fits.py": "x = 1\n" * MAX_PYTHON_LINES}
    )
    (found,) = long_files(tree)
    assert found.path == "long.py"


def test_project_tree_holds_tracked_and_new_files_but_no_ignored_or_deleted_ones(tmp_path: Path) -> None:
    planted_tree(
        tmp_path, {".gitignore": "out/\n", "tracked.py": "", "deleted.py": "", "new.py": "", "out/ignored.py": ""}
    )
    subprocess.run(["git", "init", "--quiet", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", ".gitignore", "tracked.py", "deleted.py"], cwd=tmp_path, check=True)
    (tmp_path / "deleted.py").unlink()
    assert project_tree(tmp_path).files == (".gitignore", "new.py", "tracked.py")


def assert_none(violations: list[Violation]) -> None:
    lines = [f"\n  {found}" for found in sorted(set(violations))]
    assert not lines, f"{len(lines)} violations{''.join(lines)}"
