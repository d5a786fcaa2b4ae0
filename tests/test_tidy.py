"""The style of the house as failing tests; each rule is also shown a sample that it must refuse.

After TigerBeetle's `tidy.zig`. What ruff, mypy and import-linter can say is left to them.
"""

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from handfast.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.xdist_group("tidy")  # each file is parsed once

LINE = 100
FUNCTION = 60
MODULE = 500
CORE = 3_000

SILENCER = r"#\s*(noqa|type:\s*ignore|pragma:\s*no (?:cover|branch))"

Complaint = tuple[int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(text: str) -> ast.Module:
    """The tree of a source; none is parsed twice, whoever asks."""
    return ast.parse(text)


@dataclass(frozen=True)
class Source:
    """A file of the repository; `path` is relative to its root."""

    path: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        """The lines, without their ends."""
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed module."""
        return parsed(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the module."""
        return list(ast.walk(self.tree))

    @cached_property
    def silencers(self) -> list[Complaint]:
        """Each comment that silences a tool, with its line."""
        if not re.search(SILENCER, self.text):
            return []
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        comments = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
        return [(line, comment) for line, comment in comments if re.match(SILENCER, comment)]

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, wherever they stand."""
        return [node for node in self.nodes if isinstance(node, Function)]


@dataclass(frozen=True)
class Rule:
    """A check of one file, the paths that it is for, and a sample that it must refuse."""

    name: str
    check: Callable[[Source], Iterator[Complaint]]
    paths: re.Pattern[str]
    bad: str

    def complaints(self, source: Source) -> list[str]:
        """What the rule has to say of a file, with its path and lines."""
        return [f"{source.path}:{line}: {what}" for line, what in self.check(source)]


RULES: list[Rule] = []
PYTHON = r"(src|tests)/.*\.py"
SHIPPED = r"src/.*\.py"
PURE = r"src/handfast/core/.*\.py"
ANY = r".*"


def rule(paths: str, bad: str) -> Callable[..., Callable[[Source], Iterator[Complaint]]]:
    """Make a check a rule for the paths that match, with a sample that breaks it."""

    def register(
        check: Callable[[Source], Iterator[Complaint]],
    ) -> Callable[[Source], Iterator[Complaint]]:
        RULES.append(Rule(check.__name__, check, re.compile(paths), bad))
        return check

    return register


def word(*parts: str) -> str:
    """A word that a rule bans, in pieces, so that this file passes its own rules."""
    return "".join(parts)


# Size


@rule(PYTHON, "x = 1  # " + "long " * 20)
def lines_are_short(source: Source) -> Iterator[Complaint]:
    """One hundred characters, in tests too."""
    for number, line in enumerate(source.lines, 1):
        if len(line) > LINE:
            yield number, f"{len(line)} characters, {LINE} at most"


@rule(SHIPPED, "def f():\n" + "    x = 1\n" * FUNCTION)
def functions_are_short(source: Source) -> Iterator[Complaint]:
    """What does not fit on a screen does more than one thing."""
    for node in source.functions:
        if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION:
            yield node.lineno, f"{node.name} has {length} lines, {FUNCTION} at most"


@rule(SHIPPED, "x = 1\n" * (MODULE + 1))
def modules_are_short(source: Source) -> Iterator[Complaint]:
    """Even models of good code let one file grow; the limit was there on day one."""
    if len(source.lines) > MODULE:
        yield 1, f"{len(source.lines)} lines, {MODULE} at most"


# What may be called where


@rule(r"src/handfast/(?!testing/).*\.py", "assert True")
def no_assert(source: Source) -> Iterator[Complaint]:
    """Python drops it under -O; a promise is checked, and an error raised, or neither."""
    for node in source.nodes:
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert vanishes under -O: raise an error"


TIMELESS = r"src/handfast/(?!store/claims\.py|fleet/gate/clock\.py).*\.py"


@rule(TIMELESS, "import time\nx = time.time()")
@rule(TIMELESS, "from datetime import datetime\nx = datetime.now()")
def no_wall_clock(source: Source) -> Iterator[Complaint]:
    """It is set back and forth, so nothing may hang on it; but for one label that people read."""
    calls = {"time.time", "time.time_ns", "time.localtime", "time.ctime", "datetime.now",
             "datetime.utcnow", "datetime.today", "date.today"}  # fmt: skip
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if ".".join(name.split(".")[-2:]) in calls:
                yield node.lineno, f"{name}: use time.monotonic, or no time"


@rule(PURE, "from datetime import datetime\nx = datetime.now()")
@rule(PURE, "def f(x):\n    return hash(x)")
def core_calls_nothing_impure(source: Source) -> Iterator[Complaint]:
    """No clock, no I/O, and nothing that differs from one process to the next."""
    # A digest's hash only serves dictionaries, which keep the order of insertion.
    exempt = {n for f in source.functions if f.name == "__hash__" for n in ast.walk(f)}
    banned = {"now", "utcnow", "today", "monotonic", "perf_counter", "urandom", "getenv", "environ"}
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in banned:
            yield node.lineno, f".{node.attr} is not pure"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node not in exempt:
            name = node.func.id
            if name in {"open", "print", "input", "id", "hash", "eval", "exec", "__import__"}:
                yield node.lineno, f"{name}() is not pure"


@rule(PURE, "for x in {1, 2}:\n    pass")
@rule(PURE, "x = [y for y in frozenset(z) | w]")
@rule(PURE, "def f(x):\n    seen = {y for y in x}\n    return tuple(seen)")
@rule(PURE, "def f(x: frozenset[str]):\n    return ''.join(x)")
def core_does_not_iterate_over_sets(source: Source) -> Iterator[Complaint]:
    """A set's order differs from one process to the next; its sum, size or sorted list do not."""
    for scope in (source.tree, *source.functions):
        names = set(_names_of_sets(scope))
        for node in _inside(scope):
            for ordered in _ordered(node):
                if _is_set(ordered, names):
                    yield ordered.lineno, "the order of a set: sort it first"


def _ordered(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose order a node makes visible."""
    if isinstance(node, ast.For):
        yield node.iter
    elif isinstance(node, ast.ListComp | ast.DictComp):
        yield from (generator.iter for generator in node.generators)
    elif isinstance(node, ast.Starred):
        yield node.value
    elif isinstance(node, ast.Call):
        kept = isinstance(node.func, ast.Name) and node.func.id in {
            "sorted", "len", "sum", "any", "all", "min", "max", "set", "frozenset", "isinstance",
            "bool", "map", "filter",
        }  # fmt: skip
        if isinstance(node.func, ast.Attribute):  # "".join(x), not x.add(y) or set.intersection(x)
            kept = node.func.attr not in {"join", "extend", "fromkeys"}
        for argument in node.args:
            if not kept and not isinstance(argument, ast.Starred):
                yield argument
            if not kept and isinstance(argument, ast.GeneratorExp):
                yield from (generator.iter for generator in argument.generators)


def _is_set(node: ast.expr, names: set[str]) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd | ast.Sub):
        return _is_set(node.left, names) or _is_set(node.right, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in {"set", "frozenset"}
    named = isinstance(node, ast.Name) and node.id in names
    return named or isinstance(node, ast.Set | ast.SetComp)


def _names_of_sets(scope: ast.AST) -> Iterator[str]:
    """Names that a scope binds to sets, by what is assigned or by their annotations."""
    for node in _inside(scope):
        if isinstance(node, ast.Assign) and _is_set(node.value, set()):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if _says_set(node.annotation):
                yield node.target.id
        elif isinstance(node, ast.arg) and node.annotation and _says_set(node.annotation):
            yield node.arg


def _says_set(annotation: ast.expr) -> bool:
    return re.match(r"(set|frozenset|Set|AbstractSet)\b", ast.unparse(annotation)) is not None


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a scope, without those of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, Function):
            yield from _inside(child)


@rule(r"src/handfast/store/(?!files\.py).*\.py", "import os\nos.rename('a', 'b')")
@rule(r"src/handfast/store/(?!files\.py).*\.py", "with open('a') as file:\n    pass")
@rule(r"src/handfast/store/(?!files\.py).*\.py", "Path('a').read_bytes()")
def stores_reach_the_disk_by_one_door(source: Source) -> Iterator[Complaint]:
    """What does not go through store/files.py escapes the tests that fail each call in turn."""
    calls = {
        "open", "close", "read", "write", "pread", "preadv", "pwrite", "pwritev", "fsync",
        "fdatasync", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir",
        "makedirs", "rmdir", "listdir", "scandir", "stat", "lstat", "truncate", "ftruncate",
        "statvfs", "utime", "posix_fadvise", "posix_fallocate", "sync",
    }  # fmt: skip
    methods = {"read_bytes", "read_text", "write_bytes", "write_text", "iterdir", "rglob"}
    for node in source.nodes:
        if isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id in {"os", "shutil"}
            if (of_os and node.attr in calls) or node.attr in methods:
                yield node.lineno, f"{ast.unparse(node)}: only store/files.py speaks to the disk"
        elif isinstance(node, ast.Name) and node.id == "open":
            yield node.lineno, "open(): only store/files.py speaks to the disk"


# Words


@rule(SHIPPED, "x = 1")
@rule(SHIPPED, '"""A module."""\nclass Public:\n    pass')
@rule(SHIPPED, '"""A module."""\nclass C:\n    """A class."""\n    def method(self):\n        pass')
def public_things_are_explained(source: Source) -> Iterator[Complaint]:
    """Every public module, class and function says what it does."""
    if not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"
    classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef)]
    filled = {method for node in classes for method in _methods_of_ports(node)}
    for node in _public(source.tree):
        if node not in filled and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def _methods_of_ports(node: ast.ClassDef) -> Iterator[Function]:
    """Methods by which a class fills a port: the port's own docstrings explain them."""
    methods = {each.name: each for each in node.body if isinstance(each, Function)}
    for port in ports():
        if port <= methods.keys():
            yield from (methods[name] for name in port)


@cache
def ports() -> list[set[str]]:
    """The explained methods of each Protocol that is shipped."""
    return [
        {method.name for method in node.body if isinstance(method, Function)}
        for path in (ROOT / "src").rglob("*.py")
        for node in parsed(path.read_text()).body
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in scope.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            decorators = " ".join(ast.unparse(name) for name in node.decorator_list)
            if not re.search(r"\boverload\b|\.setter\b", decorators):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


@rule(r"tests/(.*/)?test_\w+\.py", "def test_something():\n    pass")
def a_test_says_what_it_shows(source: Source) -> Iterator[Complaint]:
    """A test opens with what goes wrong for people if it fails, alone or with its module."""
    if not ast.get_docstring(source.tree):
        for node in source.functions:
            if node.name.startswith("test_") and not ast.get_docstring(node):
                yield node.lineno, f"neither {node.name} nor its module says what it shows"


@rule(PYTHON, "x = 1  # " + word("no", "qa: S101"))
@rule(PYTHON, "x = 1  # " + word("type: ig", "nore[arg-type]"))
@rule(PYTHON, "x = 1  # " + word("pragma: no ", "cover"))
def exceptions_give_a_reason(source: Source) -> Iterator[Complaint]:
    """Whoever silences a tool says why, behind a dash or in a second comment."""
    for line, comment in source.silencers:
        if not re.search(r"( - |#.*# )\w+", comment):
            yield line, f"why? {comment}"


@rule(r"tests/.*\.py", "x = 1  # " + word("type: ig", "nore[arg-type] - why"))
def only_what_is_checked_is_silenced(source: Source) -> Iterator[Complaint]:
    """mypy reads `src` and `benchmarks`, and tells there of silencers that silence nothing."""
    for line, comment in source.silencers:
        if re.match(r"#\s*type:\s*ignore", comment):
            yield line, f"mypy reads no tests: {comment}"


@rule(PYTHON, "@pytest.mark." + word("filter", 'warnings("ignore:x")'))
def warnings_that_are_ignored_give_a_reason(source: Source) -> Iterator[Complaint]:
    """A warning may be the only word of a fault."""
    for number, line in enumerate(source.lines, 1):
        if re.match(r"@pytest\.mark\.filterwarnings\(.*\)$", line.strip()):
            yield number, f"why? {line.strip()}"


@rule(ANY, word("TO", "DO: later"))
def nothing_is_left_for_later(source: Source) -> Iterator[Complaint]:
    """Notes to oneself belong to issues."""
    notes = re.compile(rf"\b({word('TO', 'DO')}|{word('FIX', 'ME')}|{word('X', 'XX')})\b")
    for number, line in enumerate(source.lines, 1):
        if notes.search(line):
            yield number, f"a note to oneself: {line.strip()}"


@rule(ANY, "see " + word("/ho", "me/me/src"))
@rule(ANY, "pip install " + word("--index", "-url http://mirror"))
def no_machine_is_named(source: Source) -> Iterator[Complaint]:
    """Nothing depends on where somebody's files lie, or where somebody's packages come from."""
    options = r"--(?:(extra-)?index-url|find-links|trusted-host)\b"
    places = rf"(?<![\w.}}])/(home|root|Users|work)/\w|{options}"
    for number, line in enumerate(source.lines, 1):
        if re.search(places, line):
            yield number, f"of one machine: {line.strip()}"


# References


@rule(r".*\.md", "[here](no/such/file.md)")
@rule(r".*\.md", "[here](README.md#no-such-heading)")
def links_resolve(source: Source) -> Iterator[Complaint]:
    """Every relative link leads to a file of the repository, and to a heading that it has."""
    for number, line in _prose(source):
        for target in re.findall(r"\]\((?!\w+:)<?([^)\s>]+)>?\)", line):
            path, _, anchor = target.partition("#")
            file = (ROOT / source.path).parent / path if path else ROOT / source.path
            if not file.exists():
                yield number, f"{target}: no such file"
            elif anchor and anchor not in _headings(file.read_text()):
                yield number, f"{target}: no such heading"


def _prose(source: Source) -> Iterator[Complaint]:
    """The lines outside code blocks, with code spans taken out."""
    fenced = False
    for number, line in enumerate(source.lines, 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "", line)


def _headings(text: str) -> set[str]:
    """The anchors of a page, as forges make them."""
    titles = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {*plain, *(f"{title}-{n}" for title in plain for n in range(1, plain.count(title)))}


@rule(r".*\.md", "backed by `tests/test_tidy.py::test_no_such_test`")
@rule(r".*\.md", "see `src/handfast/no_such_module.py`")
def named_files_and_tests_exist(source: Source) -> Iterator[Complaint]:
    """A promise names the test behind it, and the test is there."""
    for number, line in enumerate(source.lines, 1):
        for path, name in re.findall(r"\b((?:src|tests)/[\w./-]+\.py)(?:::([\w:]+))?", line):
            file = ROOT / path
            if not file.exists():
                yield number, f"{path}: no such file"
            elif name and name not in _tests(file.read_text()):
                yield number, f"{path}::{name}: no such test"


def _tests(text: str) -> set[str]:
    """The names by which pytest knows the tests of a module, and their classes."""
    names = set()
    for node in parsed(text).body:
        if isinstance(node, Function):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}::{n.name}" for n in _public(node)}
        elif isinstance(node, ast.Assign):  # TestMachine = Machine.TestCase, of Hypothesis
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


# The rules, held against the repository and against their samples


def repository() -> list[Source]:
    """Every text file that is tracked, or would be: what git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    sources = []
    for path in sorted(set(listed.split("\0")) - {""}):
        file = ROOT / path
        if file.is_file():  # and not deleted since
            data = file.read_bytes()
            if b"\0" not in data:
                sources.append(Source(path, data.decode(errors="replace")))
    return sources


@pytest.fixture(scope="module")
def sources() -> Sequence[Source]:
    """The repository, read once."""
    return repository()


@pytest.mark.parametrize("name", sorted({rule.name for rule in RULES}))
def test_the_house_is_tidy(name: str, sources: Sequence[Source]) -> None:
    """No file breaks the rule."""
    rule = next(rule for rule in RULES if rule.name == name)
    files = [source for source in sources if rule.paths.fullmatch(source.path)]
    assert files
    if complaints := [line for source in files for line in rule.complaints(source)]:
        pytest.fail("\n".join([f"{rule.check.__doc__}", *complaints]), pytrace=False)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_refuses_its_bad_sample(rule: Rule) -> None:
    """A rule that can't fail would be worth nothing."""
    assert rule.complaints(Source("sample", rule.bad))


GOOD = '''"""A module that breaks no rule."""

import os


def public(x: frozenset[str], files: object) -> list[str]:
    """Sort, since a set has no order."""
    seen = {name for name in x}
    print("src/handfast/no_such_module.md", len(seen), any(y for y in seen))  # noqa: T201 - why
    return sorted(seen | {os.path.dirname("a")})
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_accepts_a_good_sample(rule: Rule) -> None:
    """Nor would one that complains of everything."""
    good = GOOD.replace("print", "repr") if rule.name.startswith("core") else GOOD
    assert rule.complaints(Source("sample", good)) == []


# The house as a whole


def test_the_core_stays_small(sources: Sequence[Source]) -> None:
    """The whole protocol can be read in an afternoon; blank lines do not count."""
    core = [source for source in sources if re.fullmatch(PURE, source.path)]
    lines = sum(bool(line.strip()) for source in core for line in source.lines)
    assert 0 < lines <= CORE, f"{lines} lines, {CORE} at most"


def test_no_module_is_dead(sources: Sequence[Source]) -> None:
    """Every shipped module is imported by another one, or is a door of the house."""
    shipped = [source for source in sources if re.fullmatch(SHIPPED, source.path)]
    dead = unused({source.path: source.text for source in shipped}, doors())
    assert not dead, "\n".join(["nothing that runs imports:", *dead])


def test_a_dead_module_is_found() -> None:
    """Two modules that import only each other's living parts are not enough to live."""
    package = {
        "src/handfast/__init__.py": "from handfast.living import x",
        "src/handfast/living.py": "from handfast import room",
        "src/handfast/room/__init__.py": "",
        "src/handfast/room/dead.py": "import handfast.living",
        "src/handfast/door.py": "import handfast.behind",
        "src/handfast/behind.py": "",
    }
    assert unused(package, {"handfast.door"}) == ["handfast.room.dead"]


def doors() -> set[str]:
    """Modules that are reached from outside: commands, the shipped suites, and what judges traces.

    Invariants are predicates over what members have written, for whoever holds a run, a model or
    a trace against them; the protocol itself must not need them. So are the types Snap and Conv.
    """
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    suites = (ROOT / "src/handfast/testing").glob("*.py")
    commands = {entry.partition(":")[0] for entry in scripts.values()}
    commands |= {f"handfast.cli.{name}" for name in COMMANDS} | {"handfast.__main__"}
    shipped = {f"handfast.testing.{path.stem}" for path in suites}
    return {*commands, *shipped, "handfast.laws.invariants", "handfast.model.conv"}


def unused(package: dict[str, str], doors: set[str]) -> list[str]:
    """The modules that no walk along imports from a package's front or a door comes to."""
    modules = {
        path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", "."): (
            text,
            path,
        )
        for path, text in package.items()
    }
    fronts = {name for name, (_, path) in modules.items() if path.endswith("/__init__.py")}
    seen: set[str] = set()
    ahead = [n for n in modules if n in fronts | doors or n.endswith(".__main__")]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += [found for found in _imports(modules[name][0]) if found in modules]
    return sorted(set(modules) - seen)


def _imports(text: str) -> Iterator[str]:
    """The modules that a source names: in imports, or as a whole string (`python -m`, preloads)."""
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_dependency_is_pinned() -> None:
    """A red build means that we changed something, not that somebody else did."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    groups = settings["dependency-groups"].values()
    asked = [*project["dependencies"], *(need for group in groups for need in group)]
    asked += [need for extra in project["optional-dependencies"].values() for need in extra]
    asked += settings["build-system"]["requires"]
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = {re.split(r"[<>=!~\[; ]", need)[0] for need in asked}
    assert names - set(pins) == set()


def test_decisions_are_numbered_and_whole() -> None:
    """Each decision record has the template's parts, and no number is missing or used twice."""
    records = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(len(records)))
    template = _sections(records[0])
    assert template
    assert [path.name for path in records if _sections(path) != template] == []


def _sections(path: Path) -> list[str]:
    return re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)


def test_fragments_are_named_by_their_kind() -> None:
    """One file a change, so that two changes never meet in one file."""
    fragments = {path.name for path in (ROOT / "changes").iterdir()} - {"README.md"}
    assert fragments
    kinds = "added|changed|fixed|removed|format"
    assert {n for n in fragments if not re.fullmatch(rf"\d+\.({kinds})\.md", n)} == set()
