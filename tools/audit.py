"""Known vulnerabilities of what is installed: ``python -m tools.audit PIP_AUDIT`` asks PyPI's database by pip-audit.

pip-audit ends with 0 and "No known vulnerabilities found" also where it could not ask about a single package. Here the
exit status is

0   every package was looked up, and every finding is listed in SECURITY.md
1   a finding is not listed there
3   a package could not be looked up, such as without a network: nothing is known of it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "SECURITY.md"
FOUND, NOT_AUDITED = 1, 3
_OURS = "fsd-fast"


def requirements() -> list[str]:
    """What is installed beside this project, as name==version; a build's own suffix, such as +cpu, is left out."""
    found = {
        each.metadata["Name"].lower().replace("_", "-"): each.version.partition("+")[0]
        for each in metadata.distributions()
    }
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != _OURS]


def ask(pip_audit: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """What the database says of each package: name, and skip_reason or version and vulns.

    Raises:
        RuntimeError: It could not be asked at all; with pip-audit's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        command = [pip_audit, "--requirement", str(listed), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(
            f"pip-audit gave no answer (exit status {done.returncode}): {' '.join(last)}"
        ) from None
    return dependencies


def report(
    wanted: Sequence[str], answers: Sequence[dict[str, Any]], documented: str
) -> tuple[list[str], int]:
    """Lines to print and the exit status; ``documented`` is the text that lists findings which are no danger here."""
    answered = {answer["name"].lower().replace("_", "-"): answer for answer in answers if "vulns" in answer}
    missing = [each for each in wanted if each.partition("==")[0] not in answered]
    lines, unlisted = [], 0
    for name, answer in sorted(answered.items()):
        for finding in answer["vulns"]:
            names = [finding["id"], *finding.get("aliases", [])]
            listed = any(re.search(rf"{re.escape(each)}(?!\d)", documented) for each in names)
            unlisted += not listed
            fixed = ", ".join(finding.get("fix_versions", [])) or "no version"
            where = "listed in SECURITY.md" if listed else "NOT LISTED in SECURITY.md"
            lines.append(f"{name} {answer['version']}: {', '.join(names)}; fixed in {fixed}; {where}")
    lines.append(
        f"{len(wanted) - len(missing)} of {len(wanted)} packages audited, {unlisted} findings not listed"
    )
    if missing:
        lines.append(f"NOT AUDITED, the database did not answer: {', '.join(missing)}")
    return lines, FOUND if unlisted else NOT_AUDITED if missing else 0


def main(arguments: Sequence[str]) -> int:
    """Audit what this interpreter has installed; print what was found and return the exit status."""
    (pip_audit,) = arguments
    wanted = requirements()
    try:
        answers = ask(pip_audit, wanted)
    except RuntimeError as error:
        print(f"NOT AUDITED: {error}")
        return NOT_AUDITED
    lines, status = report(wanted, answers, PAGE.read_text(encoding="utf-8"))
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
