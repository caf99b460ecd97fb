"""Jobs in processes: their order, their failures, and the death of their workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsd_fast.sweep.workers import Job, run_jobs

# Not from tests.tiny: workers import this module, and need not import torch.
ROOT = Path(__file__).resolve().parents[2]


def work(payload):
    """What the workers of these tests do."""
    print("working on", payload.get("value"))
    os.write(2, b"from below\n")
    if "path" in payload:
        with open(payload["path"], "a") as file:
            file.write(f"{payload['value']} {os.getpid()}\n")
    if payload.get("die"):
        os.kill(os.getpid(), payload["die"])
    if payload.get("sleep"):
        time.sleep(payload["sleep"])
    if payload.get("raise"):
        raise ValueError("it was\nnot meant to be")
    return {"value": payload["value"], "here": os.environ.get("FSD_TEST_SLOT", ""), "process": os.getpid()}


def job(tmp_path, name, needs=(), **payload):
    return Job(name, {"value": name, **payload}, tmp_path / "logs" / f"{name}.log", tuple(needs))


def outcomes(jobs, workers=1):
    found = list(run_jobs(jobs, work, [{"FSD_TEST_SLOT": str(slot)} for slot in range(workers)]))
    assert sorted(outcome.job.name for outcome in found) == sorted(each.name for each in jobs)
    return {outcome.job.name: outcome for outcome in found}


def test_jobs_run_in_order_and_fail_alone(tmp_path):
    order = tmp_path / "order"
    jobs = [
        job(tmp_path, "last", ["first", "second"], path=str(order)),
        job(tmp_path, "first", path=str(order)),
        job(tmp_path, "second", ["first"], path=str(order)),
        job(tmp_path, "bad", path=str(order), **{"raise": True}),
        job(tmp_path, "hopeless", ["bad"]),
        job(tmp_path, "more hopeless", ["hopeless"]),
    ]
    found = outcomes(jobs)
    assert [line.split()[0] for line in order.read_text().splitlines()] == ["first", "second", "last", "bad"]
    assert found["last"].result["value"] == "last"
    assert found["last"].error is None
    assert (found["bad"].result, found["bad"].error) == (None, "it was not meant to be")
    assert found["hopeless"].error == "not started: it needs bad, which failed"
    assert found["more hopeless"].error == "not started: it needs hopeless, which failed"
    # One process did them all, and each left its own log.
    assert len({line.split()[1] for line in order.read_text().splitlines()}) == 1
    printed = (tmp_path / "logs" / "first.log").read_text()
    assert sorted(printed.splitlines()) == ["from below", "working on first"]
    assert "Traceback" in (tmp_path / "logs" / "bad.log").read_text()


def test_a_dead_worker_is_replaced(tmp_path):
    found = outcomes(
        [
            job(tmp_path, "killed", die=signal.SIGKILL),
            job(tmp_path, "aborted", die=signal.SIGABRT),
            job(tmp_path, "after"),
        ]
    )
    assert found["killed"].error.startswith(
        "its process ended with signal 9; the system may have run out of memory"
    )
    assert found["aborted"].error.startswith("its process ended with signal 6; see ")
    assert found["after"].result["value"] == "after"


def test_workers_work_side_by_side_in_their_own_environments(tmp_path):
    start = time.monotonic()
    found = outcomes([job(tmp_path, name, sleep=2) for name in ("a", "b")], workers=2)
    assert {found[name].result["here"] for name in "ab"} == {"0", "1"}
    assert time.monotonic() - start < 3.9


def test_needs_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a: expected jobs of this list in needs, got z"):
        list(run_jobs([job(tmp_path, "a", ["z"])], work, [{}]))
    with pytest.raises(ValueError, match="needs: a, b need each other"):
        list(run_jobs([job(tmp_path, "a", ["b"]), job(tmp_path, "b", ["a"])], work, [{}]))


_PARENT = """
import sys
from pathlib import Path
from fsd_fast.sweep.workers import Job, run_jobs
from tests.sweep.test_workers import work

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    payload = {"value": "long", "path": str(folder / "order"), "sleep": 60}
    list(run_jobs([Job("long", payload, folder / "log")], work, [{}]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.PIPE
    )
    order = tmp_path / "order"
    end = time.monotonic() + 60
    while not (order.exists() and order.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.1)
    worker = int(order.read_text().split()[1])
    parent.send_signal(how)
    parent.communicate(timeout=60)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")
