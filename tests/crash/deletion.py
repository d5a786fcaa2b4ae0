"""Takes one sync at a time out of the source, and puts it back.

A site is a statement of the shipped source that only syncs: a call of `fsync`, `fdatasync` or
`fsync_dir`, or of a journal's `sync`; or another call that is asked for. :func:`without` parses its
module, replaces that statement by `pass`, compiles it, and gives the new code to the living
function until the block ends.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

import handfast

SOURCE = Path(handfast.__file__).parent
SYNCS = {"fsync", "fdatasync", "fsync_dir"}


class Site(NamedTuple):
    """Where a sync stands: the module's file, the line, and the function around it."""

    path: str
    line: int
    function: str
    call: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.function}: {self.call}"


def sites(calls: Collection[str] = SYNCS) -> list[Site]:
    """Every such call of the shipped source, but for the tests that are shipped with it."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith("testing/"):
            found += list(_below(name, ast.parse(path.read_text()), (), calls))
    return found


def _below(
    path: str, node: ast.AST, names: tuple[str, ...], calls: Collection[str]
) -> Iterator[Site]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _below(path, child, (*names, child.name), calls)
        else:
            if isinstance(child, ast.Call) and _is_one(child, calls):
                yield Site(path, child.lineno, ".".join(names), ast.unparse(child))
            yield from _below(path, child, names, calls)


def _is_one(call: ast.Call, calls: Collection[str]) -> bool:
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "sync":  # of other things, too
        return "fdatasync" in calls and bool(
            re.search(r"(journal|^self)$", ast.unparse(call.func.value))
        )
    return call.func.attr in calls


class _Deletes(ast.NodeTransformer):
    def __init__(self, line: int) -> None:
        self.line = line
        self.deleted = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if node.lineno == self.line and isinstance(node.value, ast.Call):
            self.deleted += 1
            return ast.copy_location(ast.Pass(), node)
        return node


@contextlib.contextmanager
def without(site: Site) -> Iterator[None]:
    """Run the body with the source as if this statement were not in it."""
    tree = ast.parse((SOURCE / site.path).read_text(), site.path)
    deletes = _Deletes(site.line)
    tree = ast.fix_missing_locations(deletes.visit(tree))
    if deletes.deleted != 1:
        raise ValueError(f"{site}: no statement of its own, so it can't be taken out")
    code = _code(compile(tree, site.path, "exec"), site.function.split("."))
    function = _living(site)
    kept = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = kept


def _code(code: CodeType, names: list[str]) -> CodeType:
    for name in names:
        code = next(
            part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name
        )
    return code


def _living(site: Site) -> FunctionType:
    module = importlib.import_module(f"handfast.{site.path.removesuffix('.py').replace('/', '.')}")
    found = functools.reduce(inspect.getattr_static, site.function.split("."), module)
    while isinstance(found, classmethod | staticmethod) or hasattr(found, "__wrapped__"):
        found = found.__func__ if hasattr(found, "__func__") else found.__wrapped__
    assert isinstance(found, FunctionType)
    return found
