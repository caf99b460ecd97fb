"""The list of faults: what may happen to a run, and what must hold then; docs/faults.md is written from it."""

import pytest


def fault(happens, holds, *, slow=False):
    """Mark a test as that of a fault.

    Args:
        happens: What the test does to a run: a line of the page.
        holds: What must hold then.
        slow: Whether ``make test`` leaves it to ``make test-faults``.
    """
    marks = [pytest.mark.faults, *([pytest.mark.slow] if slow else [])]

    def mark(test):
        for each in marks:
            test = each(test)
        return test

    return mark
