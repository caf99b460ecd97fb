"""The audit of what is installed: what could not be looked up is never taken for harmless."""

import json

import pytest

from tools import audit

WANTED = ["numpy==2.4.6", "torch==2.13.0"]
CLEAN = [
    {"name": "numpy", "version": "2.4.6", "vulns": []},
    {"name": "torch", "version": "2.13.0", "vulns": []},
]
FINDING = {
    "id": "PYSEC-2026-1",
    "aliases": ["CVE-2026-1234"],
    "fix_versions": ["2.13.1"],
    "description": "...",
}


@pytest.fixture
def pip_audit(tmp_path, monkeypatch):
    """A program in place of pip-audit that prints what it is told to."""
    monkeypatch.setattr(audit, "requirements", lambda: WANTED)

    def says(printed, status=0, error=""):
        program = tmp_path / "pip-audit"
        (tmp_path / "printed").write_text(printed)
        (tmp_path / "error").write_text(error)
        program.write_text(
            f"#!/bin/sh\ncp $2 {tmp_path}/asked\ncat {tmp_path}/printed\ncat {tmp_path}/error >&2\nexit {status}\n"
        )
        program.chmod(0o755)
        return str(program)

    return says


def answers(*dependencies):
    return json.dumps({"dependencies": dependencies, "fixes": []})


def test_all_is_well_only_where_every_package_was_looked_up(pip_audit, tmp_path, capsys):
    assert audit.main([pip_audit(answers(*CLEAN))]) == 0
    assert (tmp_path / "asked").read_text().splitlines() == WANTED
    assert capsys.readouterr().out == "2 of 2 packages audited, 0 findings not listed\n"


@pytest.mark.parametrize(
    ("printed", "status", "error", "line"),
    [
        # What pip-audit does behind a mirror without the database: exit status 0.
        (answers(CLEAN[0], {"name": "torch", "skip_reason": "not found on PyPI"}), 0, "No known vulnerabilities found",
         "NOT AUDITED, the database did not answer: torch==2.13.0"),
        (answers(CLEAN[0]), 0, "", "NOT AUDITED, the database did not answer: torch==2.13.0"),
        ("", 1, "Traceback\nConnectionError: no network\n",
         "NOT AUDITED: pip-audit gave no answer (exit status 1): ConnectionError: no network"),
        ("{}", 0, "", "NOT AUDITED: pip-audit gave no answer (exit status 0): "),
    ],
)  # fmt: skip
def test_what_was_not_looked_up_is_said(pip_audit, capsys, printed, status, error, line):
    assert audit.main([pip_audit(printed, status, error)]) == audit.NOT_AUDITED
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("listed", "status"),
    [("", 1), ("CVE-2026-12345", 1), ("CVE-2026-1234: of no use here", 0), ("PYSEC-2026-1", 0)],
)
def test_a_finding_fails_unless_it_is_listed(pip_audit, tmp_path, monkeypatch, capsys, listed, status):
    monkeypatch.setattr(audit, "PAGE", tmp_path / "SECURITY.md")
    audit.PAGE.write_text(listed)
    found = {**CLEAN[1], "vulns": [FINDING]}
    assert audit.main([pip_audit(answers(CLEAN[0], found), 1)]) == status
    assert capsys.readouterr().out.splitlines()[0] == (
        "torch 2.13.0: PYSEC-2026-1, CVE-2026-1234; fixed in 2.13.1; "
        f"{'listed' if status == 0 else 'NOT LISTED'} in SECURITY.md"
    )


def test_a_finding_weighs_more_than_a_missing_answer():
    lines, status = audit.report(WANTED, [{**CLEAN[0], "vulns": [FINDING]}], "")
    assert status == audit.FOUND
    assert lines[-1].startswith("NOT AUDITED")


def test_everything_installed_is_asked_about():
    found = audit.requirements()
    names = [each.partition("==")[0] for each in found]
    assert {"torch", "numpy", "transformers"} <= set(names)
    assert "fsd-fast" not in names
    assert not [each for each in found if "+" in each]
