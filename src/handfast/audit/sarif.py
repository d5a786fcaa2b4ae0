"""Findings as SARIF 2.1.0 (OASIS), which continuous integration shows beside the files."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.run import Audit

__all__ = ["sarif"]

LEVELS: Final = {Strength.CERTAIN: "error", Strength.STRONG: "warning", Strength.HINT: "note"}


def sarif(audit: Audit) -> dict[str, Any]:
    """The log of one audit, to be written as JSON."""
    from importlib.metadata import version  # slow to import, seldom needed

    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "handfast audit",
                        "version": version("handfast"),
                        "rules": [
                            {"id": code.value, "shortDescription": {"text": _words(code)}}
                            for code in Code
                        ],
                    }
                },
                "results": [
                    _result(finding, listed.format)
                    for listed in audit.found
                    for finding in listed.findings
                ],
            }
        ],
    }


def _words(code: Code) -> str:
    return code.value.replace("-", " ")


def _result(finding: Finding, format_: str) -> dict[str, Any]:
    where = finding.parts or ((finding.step,) if finding.step else (".",))
    told = "\n".join((finding.says, *finding.evidence))
    places = [quote(path, errors="surrogatepass") for path in where]  # of any name a file can have
    return {
        "ruleId": finding.code.value,
        "level": LEVELS[finding.strength],
        "message": {"text": told},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri}}} for uri in places],
        "properties": {"step": finding.step, "strength": finding.strength, "format": format_},
    }
