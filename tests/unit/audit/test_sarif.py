"""Shows that places in SARIF are URIs, whatever files are called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from handfast.audit.run import audit
from handfast.audit.sarif import sarif


def uris(path: Path) -> set[str]:
    """The places of all that is wrong there, as the log says them when it was written and read."""
    log = json.loads(json.dumps(sarif(audit(path))))
    return {
        place["physicalLocation"]["artifactLocation"]["uri"]
        for result in log["runs"][0]["results"]
        for place in result["locations"]
    }


def test_a_name_with_signs_of_its_own_is_encoded(tmp_path: Path) -> None:
    """Blanks, "%", "#", "?", ":" and letters beyond ASCII: one reads the path back."""
    name = "a: b/step_1 100%41 #2 ü?.pt"
    (tmp_path / name).parent.mkdir()
    torch.save({"w": torch.rand(300)}, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    (uri,) = uris(tmp_path)
    assert urlsplit(uri).path == uri
    assert uri.isascii()
    assert unquote(uri) == name


def test_a_name_that_is_no_text_is_no_trouble(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, as a file's name can have."""
    name = os.fsdecode(b"\xff_step_1.pt")
    torch.save({"w": torch.rand(300)}, tmp_path / "whole")
    (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:-100])
    assert "%ED%B3%BF_step_1.pt" in uris(tmp_path)
