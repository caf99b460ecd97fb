"""Runs the tests of the Triton kernels, each as a test of its own.

Such a test carries the mark ``triton``. On a machine with a GPU it runs there, like any other. Elsewhere it needs
Triton's interpreter, which has to be chosen before triton is first imported: one process with TRITON_INTERPRET=1 runs
these tests one by one on demand, and each reports as if it had run here. With TRITON_INTERPRET=1 in the environment
everything runs in one process; ``-m triton`` selects the tests of the kernels.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton

from fsd_kernels import _triton
from fsd_kernels.gram import triton as gram_kernels
from fsd_kernels.intra_cka import triton as intra_kernels
from fsd_kernels.kmeans import triton as kmeans_kernels
from tests.interpreted import DEVICE, GPU, INTERPRETED, poison_outputs, record_launches, round_dots

_PIPES = "FSD_TEST_PIPES"
# In the process with the interpreter: its ends of the two pipes. Processes that tests start do not inherit them.
_ENDS = os.environ.pop(_PIPES, None)


class Interpreter:
    """A pytest process with TRITON_INTERPRET=1 that runs tests by their node ids."""

    def __init__(self, config: pytest.Config, paths: list[str]) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        asked, requests = os.pipe()
        answers, told = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", _PIPES: f"{asked},{told}"},
            cwd=config.rootpath,
            pass_fds=(asked, told),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(asked)
        os.close(told)
        self._writer, self._reader = os.fdopen(requests, "w"), os.fdopen(answers)

    def run(self, nodeid: str) -> list[dict[str, Any]]:
        """Run one test; return its reports of setup, call and teardown.

        Raises:
            RuntimeError: The process has ended; the message holds the end of its output.
        """
        try:
            print(nodeid, file=self._writer, flush=True)
            answer = self._reader.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(
                f"the interpreter's process ended with {self._process.returncode}:\n{self._log.read()[-6000:]}"
            )
        return list(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._writer.close()
        self._process.wait()
        self._reader.close()
        self._log.close()


_INTERPRETER = pytest.StashKey[Interpreter]()


class InterpretedTest(pytest.Item):
    """Stands for a test that the process with the interpreter runs."""

    def runtest(self) -> None:
        """Run the test there, and fail or skip as it does."""
        interpreter = self.session.stash.get(_INTERPRETER, None)
        if interpreter is None:
            paths = {str(item.path) for item in self.session.items if isinstance(item, InterpretedTest)}
            interpreter = Interpreter(self.config, sorted(paths))
            self.session.stash[_INTERPRETER] = interpreter
        try:
            reports = interpreter.run(self.nodeid)
        except RuntimeError as error:
            del self.session.stash[_INTERPRETER]
            interpreter.close()
            pytest.fail(str(error), pytrace=False)
        failures = [report["text"] for report in reports if report["outcome"] == "failed"]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        for report in reports:
            if report["outcome"] == "skipped":
                pytest.skip(report["text"])


def _broken_interpreter() -> bool:
    """Triton 3.6's interpreter turns arrays of one element into numbers, which numpy refuses from 2.4 on."""
    release, numpy = (
        [int(number) for number in text.split(".")[:2]] for text in (triton.__version__, np.__version__)
    )
    return release < [3, 7] and numpy >= [2, 4]


def _needs_the_interpreter(item: pytest.Item) -> bool:
    if INTERPRETED or item.get_closest_marker("triton") is None:
        return False
    return not GPU or item.get_closest_marker("interpreter_only") is not None


def _stand_in(item: pytest.Item) -> InterpretedTest:
    stand_in = InterpretedTest.from_parent(item.parent, name=item.name)
    stand_in.own_markers = item.own_markers
    stand_in.keywords.update(item.keywords)
    stand_in.reportinfo = item.reportinfo  # type: ignore[method-assign]
    return stand_in


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let stand-ins take the places of the tests that need the interpreter."""
    if _broken_interpreter():
        reason = f"the interpreter of triton {triton.__version__} does not work with numpy {np.__version__}"
        for item in filter(_needs_the_interpreter, items):
            item.add_marker(pytest.mark.skip(reason=reason))
        return
    items[:] = [_stand_in(item) if _needs_the_interpreter(item) else item for item in items]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the process with the interpreter."""
    interpreter = session.stash.get(_INTERPRETER, None)
    if interpreter is not None:
        interpreter.close()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks; in the process with the interpreter, collect what the tests report."""
    config.addinivalue_line("markers", "triton: runs the Triton kernels, interpreted or on a GPU")
    config.addinivalue_line(
        "markers", "interpreter_only: looks into Triton's interpreter, on a GPU machine too"
    )


_reports: list[dict[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome of a phase of a test."""
    if _ENDS is not None:
        if isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
        else:
            # The first line is that of pytest's summary.
            crash = getattr(report.longrepr, "reprcrash", None)
            sections = (f"--- {title} ---\n{content}" for title, content in report.sections)
            text = "\n".join([*([crash.message, ""] if crash else []), report.longreprtext, *sections])
        _reports.append({"outcome": report.outcome, "text": text})


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests that are asked for through the pipe, until it is closed."""
    if _ENDS is None:
        return None
    asked, told = (int(number) for number in _ENDS.split(","))
    items = {item.nodeid: item for item in session.items}
    with os.fdopen(asked) as requests, os.fdopen(told, "w") as answers:
        for line in requests:
            _reports.clear()
            item = items[line.rstrip("\n")]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            print(json.dumps(_reports), file=answers, flush=True)
    return True


@pytest.fixture(autouse=True)
def _conditions_of_the_kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """One thread, and NaN in every output that a kernel does not write."""
    if request.node.get_closest_marker("triton") is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    poison_outputs(monkeypatch)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of multiprocessors that the heuristics see: few make them fuse, many make them split."""

    def choose(count: int) -> None:
        target = _triton.target_of(DEVICE)._replace(multiprocessors=count)
        for module in (gram_kernels, intra_kernels, kmeans_kernels):
            monkeypatch.setattr(module, "target_of", lambda device: target)

    return choose


@pytest.fixture
def few_multiprocessors(multiprocessors: Callable[[int], None]) -> None:
    """Let the heuristics see so few multiprocessors that small inputs fill them."""
    multiprocessors(2)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let the heuristics choose as if tensor cores multiplied float32; the interpreter multiplies exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched."""
    return record_launches(monkeypatch)


@pytest.fixture
def rounded_dots(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Round the operands of every dot to this many bits; on a GPU its tensor cores do."""
    if INTERPRETED:
        return lambda bits: round_dots(monkeypatch, bits)

    def choose(bits: int) -> None:
        monkeypatch.setattr(_triton, "dot_precision", lambda: "tf32")

    return choose
