"""Break the Triton kernels on purpose and see whether the tests notice: ``python -m benchmarks mutate``.

A mutation is one textual change to one kernel file, made in a copy of the packages. The tests of the op's kernels then
run on the copy, interpreted, until one fails; a mutation that no test catches survives. The command exits with 1 if
fewer than 95 % are caught, if a survivor has no explanation in the list, or if the text to change is gone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compiled.mutations import MUTATIONS, Mutation
from benchmarks.paths import ROOT

NEEDED = 0.95

TESTS = {op: f"tests/kernels/test_{op}.py" for op in ("intra_cka", "gram", "structure", "kmeans")}
"""The file of each op's tests."""


def mutated(mutation: Mutation, text: str) -> str | None:
    """Return the file's text with the change made; None if it has no such text."""
    start = text.find(mutation.where)
    at = text.find(mutation.old, start) if start >= 0 else -1
    return None if at < 0 else text[:at] + mutation.new + text[at + len(mutation.old) :]


def caught_by(op: str, mutation: Mutation, folder: Path) -> str | None:
    """Return the first test that fails on a mutated copy in ``folder``; None: all pass; "": the text is gone."""
    for name in ("kernels", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
    path = folder / "kernels" / "fsd_kernels" / op / "triton.py"
    text = mutated(mutation, path.read_text())
    if text is None:
        return ""
    path.write_text(text)
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "triton", TESTS[op]
    ]  # fmt: skip
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "kernels"),
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return None
    return failed[0].split("::")[-1].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def main(argv: Sequence[str]) -> int:
    """Print the test that catches each mutation; return 1 if too few are caught."""
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__)
    parser.add_argument("--op", choices=list(TESTS), help="only this op's mutations")
    parser.add_argument("--first", type=int, help="only the first so many")
    arguments = parser.parse_args(argv)
    ops = [arguments.op] if arguments.op else list(MUTATIONS)
    chosen = [(op, mutation) for op in ops for mutation in MUTATIONS[op]][: arguments.first]
    caught, missing, unexplained = 0, 0, 0
    print("| op | change | caught by |\n|---|---|---|")
    for op, mutation in chosen:
        with tempfile.TemporaryDirectory() as folder:
            test = caught_by(op, mutation, Path(folder))
        caught += bool(test)
        missing += test == ""
        unexplained += test is None and not mutation.explanation
        verdict = test or (
            "TEXT NOT FOUND" if test == "" else f"survives: {mutation.explanation or 'UNEXPLAINED'}"
        )
        print(f"| {op} | {mutation.what} | {verdict} |", flush=True)
    print(f"{caught} of {len(chosen)} caught, {missing} not applicable, {unexplained} unexplained")
    return int(caught < NEEDED * len(chosen) or missing > 0 or unexplained > 0)
