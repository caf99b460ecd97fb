"""The mutations of the kernels: each changes the code that it names, and nothing before it."""

from __future__ import annotations

import pytest

from benchmarks.compiled.mutate import TESTS, mutated
from benchmarks.compiled.mutations import MUTATIONS, Mutation
from benchmarks.paths import ROOT


@pytest.mark.parametrize("op", sorted(MUTATIONS))
def test_every_mutation_finds_its_text(op: str) -> None:
    text = (ROOT / "kernels" / "fsd_kernels" / op / "triton.py").read_text(encoding="utf-8")
    gone = [each.what for each in MUTATIONS[op] if mutated(each, text) in (None, text)]
    assert gone == []


@pytest.mark.parametrize("op", sorted(MUTATIONS))
def test_the_tests_of_every_op_exist(op: str) -> None:
    assert (ROOT / TESTS[op]).is_file()


def test_a_mutation_changes_the_first_text_after_its_place() -> None:
    text = "def f():\n    x + y\n\ndef g():\n    x + y\n    x + y\n"
    changed = mutated(Mutation("def g", "x + y", "x - y", "sign"), text)
    assert changed == "def f():\n    x + y\n\ndef g():\n    x - y\n    x + y\n"
    assert mutated(Mutation("def h", "x + y", "x - y", "sign"), text) is None
    assert mutated(Mutation("def g", "x * y", "x - y", "sign"), text) is None
