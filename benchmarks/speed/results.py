"""Rows, results and their JSON files; comparison of two results.

A file holds ``schema``, ``environment`` (device, versions, threads, commit, date), ``ceilings`` (the machine's rates
in the same run), ``rows`` and ``checks``. It is replaced as a whole when written, and validated when read.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.paths import RESULTS, ROOT
from benchmarks.speed.harness import Spread, ratio, spread
from fsd_fast.files import write_atomically

SCHEMA = 1

OK, WRONG, UNAVAILABLE, BOUND = "ok", "wrong", "unavailable", "bound"


@dataclass(frozen=True)
class Row:
    """One provider on one case in one mode."""

    op: str
    case: str
    """The sizes, e.g. "B=32 S=128 D=768"."""
    sizes: dict[str, int]
    provider: str
    mode: str
    status: str
    """"ok", "wrong" (refused by the gate, not timed), "unavailable", or "bound" (a part of the work, no provider)."""
    reason: str = ""
    note: str = ""
    samples: list[float] = field(default_factory=list)
    """Seconds, one per round; all rows of a case and mode have the same rounds."""
    noisy: bool = False
    canary_spread: float = 0.0
    canary_share: float = 1.0
    value_error: float | None = None
    gradient_error: float | None = None
    outlier_value_error: float | None = None
    """Error on features with BERT's outlier dimensions."""
    outlier_gradient_error: float | None = None
    matmul_percent: float | None = None
    """Minimal flops per second, in percent of the canary's rate in the same rounds."""
    copy_percent: float | None = None
    """Minimal bytes per second, in percent of the machine's own copy."""
    minimal_flops: int | None = None
    peak_bytes: int | None = None
    """Largest number of bytes held beyond the inputs; results count."""
    returned_bytes: int | None = None
    """Bytes of the gradients."""
    host_seconds: float | None = None
    """Seconds in which the CPU enqueues a call; GPU runs only."""

    @property
    def time(self) -> Spread:
        """Median and quartiles in seconds.

        Raises:
            ValueError: The row was not timed.
        """
        return spread(self.samples)


@dataclass(frozen=True)
class CheckResult:
    """One performance target, and whether a run reached it."""

    name: str
    required: str
    measured: str
    passed: bool | None
    """None: the run did not measure the rows it needs."""
    noisy: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """Everything that one run measured."""

    environment: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[Row]
    checks: list[CheckResult] = field(default_factory=list)

    def find(self, op: str, case: str, mode: str, provider: str) -> Row | None:
        """Return the timed row with these keys, or None."""
        for row in self.rows:
            if (row.op, row.case, row.mode, row.provider, row.status) == (op, case, mode, provider, OK):
                return row
        return None

    def bound(self, op: str, case: str, mode: str) -> Row | None:
        """Return the row of the op's bound, timed in the same rounds as its providers, or None."""
        for row in self.rows:
            if (row.op, row.case, row.mode, row.status) == (op, case, mode, BOUND):
                return row
        return None

    def speedup(self, row: Row) -> Spread | None:
        """Return the row's time over ours, round by round; None if ours was not timed in the same rounds."""
        ours = self.find(row.op, row.case, row.mode, "ours")
        if ours is None or not row.samples or len(row.samples) != len(ours.samples):
            return None
        return ratio(row.samples, ours.samples)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the name of the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions, so that a reader can repeat the run.

    A tree without its git folder has the commit that the variable ``FSD_COMMIT`` names.
    """
    import importlib.metadata

    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    peers = ("triton", "pytorch-cka", "cka-pytorch", "ckatorch", "scikit-learn", "faiss-cpu", "fastkmeans")
    for name in (*peers, "fast-pytorch-kmeans", "flash-kmeans"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("FSD_COMMIT") or "unknown",
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def default_path(result: Result) -> Path:
    """Return ``benchmarks/results/<device>/<date>-<commit>.json``."""
    device = re.sub(r"[^a-z0-9]+", "-", str(result.environment["device"]).lower()).strip("-")
    threads = (
        f"-{result.environment['threads']}-threads" if result.environment["device_type"] == "cpu" else ""
    )
    stem = f"{result.environment['date']}-{result.environment['commit']}"
    return RESULTS / f"{device}{threads}" / f"{stem}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file by replacing it as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def save(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    content = {"schema": SCHEMA, **dataclasses.asdict(result)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no result of this schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a benchmark result of schema {SCHEMA}")
    try:
        return from_content(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark result ({error})") from error


def from_content(content: dict[str, Any]) -> Result:
    """Build a result from the content of its JSON file.

    Raises:
        KeyError, TypeError: A field is missing or unknown.
    """
    return Result(
        content["environment"],
        content["ceilings"],
        [Row(**row) for row in content["rows"]],
        [CheckResult(**check) for check in content["checks"]],
    )


def compare(before: Result, after: Result) -> list[str]:
    """Describe in one line each row whose times changed by more than the spread: the quartiles do not overlap."""
    lines = []
    for row in after.rows:
        old = before.find(row.op, row.case, row.mode, row.provider)
        if old is None or row.status != OK:
            continue
        was, now = old.time, row.time
        if now.low <= was.high and was.low <= now.high:
            continue
        word = "slower" if now.median > was.median else "faster"
        factor = max(now.median, was.median) / min(now.median, was.median)
        mark = " (noisy run)" if old.noisy or row.noisy else ""
        lines.append(
            f"{row.op} {row.case} {row.mode} {row.provider}: {was.median * 1e3:.2f} ms -> {now.median * 1e3:.2f} ms, "
            f"{factor:.2f}x {word}{mark}"
        )
    return lines
