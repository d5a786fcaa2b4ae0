"""Shows that a user's function is found again in another process, wherever it stood."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from handfast.testing.exact.task import Packed, go_on, pack, stand_still, stands, unpack

SOURCE = """
def job(path, steps, scale=1):
    return path * steps * scale


class Jobs:
    @staticmethod
    def inner(path, steps):
        return path + str(steps)
"""


def elsewhere(packed: Packed) -> str:
    """What the function gives in a fresh interpreter that knows nothing of it."""
    program = """
import sys, msgspec
from handfast.testing.exact.task import Packed, unpack
print(unpack(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=Packed))("ab", 2))
"""
    told = msgspec.msgpack.encode(packed).hex()
    argv = [sys.executable, "-c", program, told]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["users_job", "a.package.users_job", "__main__"])
def test_a_function_is_found_by_its_file_where_its_module_has_no_home(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test runners load modules, from a package that is none, or as the script itself."""
    file = tmp_path / "users_job.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for package in ("a", "a.package"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert elsewhere(pack(module.job)) == "abab"
    assert elsewhere(pack(partial(partial(module.job, scale=2)))) == "abababab"
    assert elsewhere(pack(module.Jobs.inner)) == "ab2"


def test_a_module_of_that_name_from_another_place_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two test files may be called alike: the function's own file counts."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twins.py").write_text(f"def job(path, steps):\n    return '{folder}'")
    monkeypatch.syspath_prepend(str(tmp_path / "one"))
    import twins  # made just now

    packed = msgspec.structs.replace(pack(twins.job), file=str(tmp_path / "two" / "twins.py"))
    assert unpack(packed)("", 0) == "two"
    monkeypatch.delitem(sys.modules, "twins")


def test_what_its_module_raises_is_raised(tmp_path: Path) -> None:
    """An import that fails in the user's own module is shown as it is."""
    file = tmp_path / "users_broken.py"
    file.write_text("import a_module_that_nobody_has\n")
    packed = Packed(b"cusers_broken\njob\n.", "users_broken", str(file))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        unpack(packed)
    with pytest.raises(ImportError, match="no Python source"):
        unpack(msgspec.structs.replace(packed, file=str(tmp_path / "job.txt")))


def test_a_function_without_a_file_or_a_name_is_refused() -> None:
    """A builtin stands in no file; what is local has no name that another process knows."""

    def local(path: str, steps: int) -> None:
        pass

    for job, why in ((print, "stands in no file"), (local, "local object"), (3, "is no function")):
        with pytest.raises(TypeError, match=why):
            pack(job)  # on purpose


def test_a_rank_that_stands_still_ends_with_whoever_could_kill_it(tmp_path: Path) -> None:
    """A trial that was itself killed leaves no rank behind."""
    stand = f"from handfast.testing.exact.task import stand_still; stand_still({str(tmp_path)!r})"
    program = f"""
import subprocess, sys, time
from handfast.testing.exact.task import stands
subprocess.Popen([sys.executable, "-c", {stand!r}])
while not stands({str(tmp_path)!r}):
    time.sleep(0.01)
"""
    # The pipe that the rank has inherited ends with it.
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60)


def test_a_rank_that_is_told_goes_on(tmp_path: Path) -> None:
    """Where it was not killed."""
    assert not stands(str(tmp_path))
    go_on(str(tmp_path))
    stand_still(str(tmp_path))
    assert stands(str(tmp_path))


def test_the_shipped_tests_load_no_torch() -> None:
    """Storages are tried out where there is none, and a runner of tests begins at once."""
    program = "import handfast.testing, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
