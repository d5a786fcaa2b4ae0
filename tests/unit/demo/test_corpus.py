"""Shows that every machine with Python has the demo's text, and that two runs can compare it."""

from pathlib import Path

import pytest

from handfast.demo.corpus import read
from handfast.errors import HandfastError


def test_the_standard_library_is_text_enough() -> None:
    """Bounded, in a small alphabet, the same each time; its digest follows its content."""
    one, again, less = read(limit=50_000), read(limit=50_000), read(limit=49_999)
    assert one == again
    assert len(one.codes) == 50_000
    assert len(one.alphabet) < 100
    assert max(one.codes) < len(one.alphabet)
    assert one.digest != less.digest


def test_codes_spell_the_text(tmp_path: Path) -> None:
    """Modules in order of name; what is neither printable ASCII nor a line's end is left out."""
    (tmp_path / "b.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "a.py").write_text("import b\n\t# tab\n", encoding="utf-8")
    found = read(tmp_path)
    text = "".join(found.alphabet[code] for code in found.codes)
    assert text == "import b\n# tab\nx = ''\n"


def test_an_interpreter_without_sources_is_told_so(tmp_path: Path) -> None:
    """A stripped image ships byte code alone."""
    with pytest.raises(HandfastError, match="no Python sources"):
        read(tmp_path)
