"""The scripts that wrote the golden files, for what they put in."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def writer(request: pytest.FixtureRequest) -> ModuleType:
    """The script that wrote what the asking module tests."""
    name = request.module.__name__.rpartition(".")[2].replace("test_", "write_")
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        pytest.fail(f"{path} can't be read")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
