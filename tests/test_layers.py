"""Shows that data flows one way, that the core is pure, and that both rules can be broken."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"

# What the core may stand on: values, order and arithmetic, nothing that can differ between two
# runs. hashlib digests bytes; msgspec makes frozen values.
PURE = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "fractions", "functools",
    "hashlib", "heapq", "itertools", "math", "msgspec", "operator", "types", "typing",
}  # fmt: skip

PLANTED = {
    "errors": ("layers", "import handfast.store.journal"),
    "store/upward": ("layers", "from handfast.agent import wire"),
    "agent/upward": ("layers", "from handfast.testing import faults"),
    "testing/outward": ("testing", "import handfast.torch.names"),
    "core/clock": ("pure", "import time"),
    "core/socket": ("pure", "def later():\n    import socket\n    return socket"),
    "store/numbers": ("frameworks", "def later():\n    import numpy\n    return numpy"),
    "agent/tensors": ("frameworks", "import torch"),
    "checkpoint/arrays": ("frameworks", "import jax"),
    "core/one": ("cycles", "import handfast.core.other"),
    "core/other": ("cycles", "import handfast.core.one"),
    "attic": ("layers", "ROOM = 'of no layer'"),
}


def contracts() -> dict[str, str]:
    """The names of the contracts, by id."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {c["id"]: c["name"] for c in settings["tool"]["importlinter"]["contracts"]}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Hold a tree with a pyproject.toml and a src/ against its contracts."""
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-logo", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the sources and the contracts, to be spoilt."""
    shutil.copytree(SOURCES, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layers_hold(house: Path) -> None:
    """No room imports one above it, and none but the frameworks' own knows one."""
    done = lint(house)
    assert done.returncode == 0, done.stdout + done.stderr


def test_planted_imports_are_caught(house: Path) -> None:
    """Each contract breaks when it is violated, and names the import that did it."""
    for path, (_, line) in PLANTED.items():
        with (house / "src" / "handfast" / f"{path}.py").open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(house)
    assert done.returncode == 1, done.stderr
    for identity, name in contracts().items():
        assert f"{name} BROKEN" in done.stdout, identity
    report = done.stdout[done.stdout.index("Broken contracts") :]
    for path in PLANTED:
        assert re.search(rf"\b{Path(path).name}\b", report), path


def test_every_contract_has_a_planted_violation() -> None:
    """So that no contract is there for show."""
    assert {identity for identity, _ in PLANTED.values()} == set(contracts())


def test_the_core_imports_only_what_is_pure() -> None:
    """An allow-list, since a list of what is forbidden is never complete."""
    found = {
        (path.name, name.partition(".")[0])
        for path in (SOURCES / "handfast" / "core").glob("*.py")
        for name in imported(path.read_text())
        if not name.startswith("handfast.core")
    }
    assert {(path, name) for path, name in found if name not in PURE} == set()


def imported(text: str) -> list[str]:
    """The modules that a source imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def test_only_the_torch_room_loads_torch() -> None:
    """An agent stays small, and a store can be read where no torch is installed."""
    program = """
import importlib, pkgutil, sys
import handfast
for room in ("core", "errors", "store", "agent", "checkpoint"):
    module = importlib.import_module(f"handfast.{room}")
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if found.name != "__main__":
            importlib.import_module(f"{module.__name__}.{found.name}")
print([name for name in ("torch", "jax", "tensorflow", "numpy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
