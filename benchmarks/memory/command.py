"""The teacher memory: quality, teacher passes, memory, and time against the released procedure and k-means libraries.

python -m benchmarks memory                 print the figures
python -m benchmarks memory --check         and exit 1 where a number is missed
python -m benchmarks memory --part widths   the table of sketch width against inertia

quality   inertia of ``cluster_stream`` / mean inertia of scikit-learn's KMeans (k-means++, n_init=1) on the same
          teacher features, K = 100, three seeds each
build     a memory of RTE at S = 128 with the MiniLM backbone: passes, and time beside the teacher's own forward;
          then, on some of the samples, against the released procedure in the same run, with what the teacher's
          forward alone would allow
peak      growth of the process's peak memory with N, per sample, against the bytes of a sketch
step      one assignment and update against scikit-learn's inner kernel, faiss-cpu and plain torch

The backbone stands in for a fine-tuned teacher: the features are as wide and as correlated, and nothing here
depends on labels. Padding is excluded and batches are padded to their own longest sample, as in the commands; a
data set whose longest sample is shorter than S has zeros from there on, which are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers
from sklearn.cluster import KMeans
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.paths import ROOT
from benchmarks.speed import harness
from benchmarks.speed.inputs import Sizes
from benchmarks.speed.measure import Settings, measure_op
from benchmarks.speed.registry import OPS
from benchmarks.speed.report import aligned
from fsd_fast.cache.feature_cache import FeatureCache, FeatureIdentity
from fsd_fast.clustering.two_pass import cluster_stream
from fsd_fast.data import (
    LENGTH_COLUMN,
    PadCollator,
    get_task,
    load_task_dataset,
    resolve_model,
    tokenize,
)
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity, flatten_features, model_fingerprint
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.student import load_classifier
from fsd_fast.models.teacher import Teacher

CLUSTERS, LENGTH, BATCH, SEEDS = 100, 128, 32, 3
PARTS = ("quality", "widths", "build", "peak", "step")
TASKS = {"rte": "RTE", "cola": "CoLA", "reviews": None}
WIDTHS = (128, 256, 512, 1024, 2048, 4096)


class Number(NamedTuple):
    """A measured number and what it must be."""

    name: str
    value: float
    limit: str
    passed: bool

    @classmethod
    def at_most(cls, name: str, value: float, most: float) -> Number:
        """A number with an upper limit."""
        return cls(name, value, f"<= {most:g}", value <= most)

    @classmethod
    def at_least(cls, name: str, value: float, least: float) -> Number:
        """A number with a lower limit."""
        return cls(name, value, f">= {least:g}", value >= least)


class Source:
    """The training samples of a task, in order of length, and the teacher that runs over them.

    Args:
        name: The task.
        glue: Folder that holds the official GLUE folders.
        most: Samples at most, spread evenly over the training set; None: all.
    """

    def __init__(self, name: str, glue: Path, most: int | None) -> None:
        folder = TASKS[name]
        path = resolve_model("minilm")
        tokenizer = AutoTokenizer.from_pretrained(path)
        task = get_task(name)
        rows = load_task_dataset(task, None if folder is None else glue / folder)["train"]
        if most is not None and most < len(rows):
            rows = rows.select(np.linspace(0, len(rows) - 1, most).astype(int))
        tokens = tokenize(rows, tokenizer, task, LENGTH)
        self.task = task.name
        self.samples = tokens.select(np.argsort(tokens[LENGTH_COLUMN], kind="stable"))
        self.longest = int(max(tokens[LENGTH_COLUMN]))
        self.tokens = hashlib.sha256(repr([list(ids) for ids in tokens["input_ids"]]).encode()).hexdigest()
        # Its head is random; the features are read below it.
        self.teacher = Teacher(load_classifier(path, task.labels), path)
        self.tokenizer = tokenizer
        self.forwards = 0
        self.forward_seconds = 0.0

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self, pad_features: str, length: int = LENGTH) -> MemoryIdentity:
        """What a memory of these features is."""
        return MemoryIdentity(
            task_name=self.task,
            teacher=self.teacher.name,
            teacher_fingerprint=model_fingerprint(self.teacher.model),
            layer=self.teacher.num_layers - 1,
            max_seq_length=length,
            hidden_size=self.teacher.hidden_size,
            num_centroid=CLUSTERS,
            pad_features=pad_features,
        )

    def cache(self, folder: Path, own: MemoryIdentity) -> FeatureCache:
        """A feature cache in a folder."""
        record = dataclasses.asdict(own)
        names = {item.name for item in dataclasses.fields(FeatureIdentity)} & record.keys()
        identity = FeatureIdentity(
            **{name: record[name] for name in names},
            dtype="float32",
            num_samples=len(self),
            tokens=self.tokens,
        )
        cache = FeatureCache(folder, identity)
        cache.create()
        return cache

    def batches(
        self,
        pad_features: str,
        start: int = 0,
        *,
        cache: FeatureCache | None = None,
        all_layers: bool = False,
    ) -> Iterator[FeatureBatch]:
        """Read the samples from batch ``start`` on; counts those that the teacher runs on, and its seconds."""
        collate = PadCollator(self.tokenizer, pad_features, LENGTH)
        for first in range(start * BATCH, len(self), BATCH):
            index = torch.arange(first, min(first + BATCH, len(self)))
            stored = None if cache is None else cache.read(index)
            if stored is not None:
                yield FeatureBatch(stored, None, index, computed=False)
                continue
            inputs = collate([self.samples[int(i)] for i in index])
            started = time.perf_counter()
            if all_layers:
                features = self.teacher.hidden_states(inputs)[1][self.teacher.num_layers - 1]
            else:
                features = self.teacher.penultimate(inputs)
            self.forward_seconds += time.perf_counter() - started
            self.forwards += len(index)
            yield FeatureBatch(features, inputs["attention_mask"], index)
            if cache is not None:
                cache.write(index, features, inputs["attention_mask"])

    def features(self) -> Tensor:
        """All features [N, S' D], S' the longest sample's length."""
        identity = self.identity("exclude", self.longest)
        points = torch.zeros(len(self), identity.features)
        for batch in self.batches("exclude"):
            flat = flatten_features(batch, identity)
            points[batch.sample_index, : flat.shape[1]] = flat
        return points


# --------------------------------------------------------------------------------------------- quality


def _sklearn_inertias(points: Tensor) -> list[float]:
    return [
        float(KMeans(CLUSTERS, n_init=1, random_state=seed, max_iter=300).fit(points.numpy()).inertia_)
        for seed in range(SEEDS)
    ]


def quality(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Inertia against scikit-learn on every task."""
    numbers: list[Number] = []
    facts: dict[str, Any] = {}
    for name in options.tasks:
        source = Source(name, options.glue, options.samples)
        points = source.features()
        theirs = _sklearn_inertias(points)
        mean = statistics.mean(theirs)
        found = [cluster_stream(points, CLUSTERS, seed=seed) for seed in range(SEEDS)]
        ratios = [one.inertia / mean for one in found]
        facts[name] = {
            "samples": len(source),
            "longest": source.longest,
            "scikit-learn": theirs,
            "ours": [one.inertia for one in found],
        }
        print(
            f"{name}: {len(source)} samples, longest {source.longest} tokens; scikit-learn "
            f"{mean:.6g} ({max(theirs) / min(theirs):.4f} between its seeds); ours / scikit-learn "
            f"{', '.join(f'{ratio:.4f}' for ratio in ratios)}",
            flush=True,
        )
        numbers.append(Number.at_most(f"{name}: inertia ratio, mean", statistics.mean(ratios), 1.01))
        numbers.append(Number.at_most(f"{name}: inertia ratio, worst seed", max(ratios), 1.02))
    return numbers, facts


def widths(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Inertia and time for sketches of several widths; nothing is held against a limit."""
    facts: dict[str, Any] = {}
    for name in options.tasks:
        source = Source(name, options.glue, options.samples)
        points = source.features()
        mean = statistics.mean(_sklearn_inertias(points))
        table = [["sketch width", "bytes per sample", "inertia ratio, mean", "worst of 3", "k-means seconds"]]
        facts[name] = {}
        for width in WIDTHS:
            found = [cluster_stream(points, CLUSTERS, seed=seed, sketch_width=width) for seed in range(SEEDS)]
            ratios = [one.inertia / mean for one in found]
            seconds = statistics.mean(one.seconds["sketch_clustering"] for one in found)
            facts[name][width] = {"ratios": ratios, "seconds": seconds}
            table.append(
                [
                    str(width),
                    str(4 * width),
                    f"{statistics.mean(ratios):.4f}",
                    f"{max(ratios):.4f}",
                    f"{seconds:.1f}",
                ]
            )
        refined = [
            cluster_stream(points, CLUSTERS, seed=seed, refine=2).inertia / mean for seed in range(SEEDS)
        ]
        facts[name]["2048, refine 2"] = {"ratios": refined}
        table.append(
            ["2048, 2 exact epochs", "8192", f"{statistics.mean(refined):.4f}", f"{max(refined):.4f}", ""]
        )
        print(f"{name}, {len(source)} samples, F = {points.shape[1]}\n{aligned(table)}", flush=True)
    return [], facts


# ----------------------------------------------------------------------------------------------- build


def released_procedure(source: Source, generator: torch.Generator) -> Tensor:
    """The released builder, written afresh: three epochs of two passes, each runs the whole teacher over everything.

    First pass of an epoch: in the first one, centroids are drawn anew for every example from running statistics
    that are reset at every step; every example is compared with all centroids and its id goes into its cluster's
    list. Second pass: the lists are searched for every example, and its cluster's average, whose count is reset at
    every step, takes it in. All S positions count.
    """
    identity = source.identity("include")
    centroids = torch.zeros(CLUSTERS, identity.features)
    for epoch in range(3):
        members: list[list[int]] = [[] for _ in range(CLUSTERS)]
        for batch in source.batches("include", all_layers=True):
            flat = flatten_features(batch, identity)
            mean, square = torch.zeros(identity.features), torch.zeros(identity.features)
            for count, (number, example) in enumerate(zip(batch.sample_index.tolist(), flat, strict=True), 1):
                if epoch == 0:
                    mean += (example - mean) / count
                    square += (example.square() - square) / count
                    deviation = (square - mean.square()).clamp_(min=0).sqrt_()
                    drawn = torch.randn(CLUSTERS, identity.features, generator=generator)
                    centroids = mean + deviation * drawn
                members[int((centroids - example).square().sum(dim=1).argmin())].append(number)
        averages = torch.zeros(CLUSTERS, identity.features)
        for batch in source.batches("include", all_layers=True):
            counts = [1] * CLUSTERS
            for number, example in zip(
                batch.sample_index.tolist(), flatten_features(batch, identity), strict=True
            ):
                for cluster, ids in enumerate(members):
                    if number in ids:
                        counts[cluster] += 1
                        averages[cluster] += (example - averages[cluster]) / counts[cluster]
        centroids = averages
    return centroids


def _built(source: Source, pad_features: str, cached: bool) -> tuple[TeacherMemory, float]:
    """A memory and the seconds that it took, those of writing a new feature cache included."""
    source.forwards, source.forward_seconds = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        identity = source.identity(pad_features)
        cache = source.cache(Path(folder) / "features", identity) if cached else None
        memory = TeacherMemory.build(
            lambda start: source.batches(pad_features, start, cache=cache),
            identity,
            seed=0,
            progress=False,
            num_samples=len(source),
        )
        return memory, time.perf_counter() - started


def build(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """A whole build of RTE: teacher passes, clustering time, and speed against the released procedure."""
    source = Source("rte", options.glue, options.samples)
    memory, total = _built(source, "exclude", False)
    share = (total - source.forward_seconds) / source.forward_seconds
    print(
        f"rte, {len(source)} samples, padding excluded, no cache: {total:.1f} s, of which the teacher's forward "
        f"{source.forward_seconds:.1f} s in {source.forwards / len(source):g} passes; "
        + ", ".join(f"{k} {v} s" for k, v in memory.seconds.items()),
        flush=True,
    )
    facts: dict[str, Any] = {"samples": len(source), "seconds": total, "forward": source.forward_seconds}
    numbers = [
        Number.at_most("rte: teacher passes", source.forwards / len(source), 2),
        Number.at_most("rte: clustering time / the teacher's forward", share, 0.25),
    ]
    if len(source) > options.released_samples:
        source = Source("rte", options.glue, options.released_samples)
    names = {
        (policy, cached): f"padding {policy}d, {'with' if cached else 'without'} a feature cache"
        for policy in ("exclude", "include")
        for cached in (True, False)
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*names.values(), "released")}
    forwards: dict[str, list[float]] = {name: [] for name in names.values()}
    passes: dict[str, float] = {}
    # In turn, so that a slow moment of the machine falls on all.
    for _ in range(options.rounds):
        for (policy, cached), name in names.items():
            seconds[name].append(_built(source, policy, cached)[1])
            forwards[name].append(source.forward_seconds)
            passes[name] = source.forwards / len(source)
        started = time.perf_counter()
        released_procedure(source, torch.Generator().manual_seed(0))
        seconds["released"].append(time.perf_counter() - started)
    released = seconds["released"]
    print(f"rte, {len(source)} samples: the released procedure {statistics.median(released):.1f} s")
    table = [["build", "teacher passes", "seconds", "times faster", "its forward alone"]]
    for (_, cached), name in names.items():
        faster, bound = harness.ratio(released, seconds[name]), harness.ratio(released, forwards[name])
        table.append(
            [
                name,
                f"{passes[name]:g}",
                f"{statistics.median(seconds[name]):.1f}",
                f"{faster.median:.1f} ({faster.low:.1f} to {faster.high:.1f})",
                f"{bound.median:.1f}",
            ]
        )
        if cached:
            number = f"rte, {len(source)} samples, {name}: times faster than the released procedure"
            numbers += [Number.at_least(number, faster.median, least_faster(bound.median))]
            numbers += [Number.at_most(f"rte, {name}: teacher passes", passes[name], 1)]
    print(aligned(table), flush=True)
    return numbers, facts | {
        "compared_samples": len(source),
        "compared_seconds": seconds,
        "compared_forward_seconds": forwards,
    }


def least_faster(bound: float) -> float:
    """How many times faster than the released procedure a build must be, if its forward alone were ``bound`` times.

    8; or, where one pass of the teacher over all S positions takes nearly an eighth of the released procedure's time
    by itself, 85 % of what a build that does nothing else would reach.
    """
    return min(8.0, 0.85 * bound)


# ------------------------------------------------------------------------------------------------ peak

_PEAK = """
import re, sys, torch
from fsd_fast.clustering.two_pass import cluster_stream
torch.set_num_threads(1)
rows, features, width = map(int, sys.argv[1:])
class Stream:
    def read_from(self, batches, done):
        for start in range(batches * 50, rows, 50):
            generator = torch.Generator().manual_seed(start)
            yield torch.randn(50, features, generator=generator)
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
cluster_stream(torch.randn(200, 600), 20, seed=0, sketch_width=width)
before = status("VmRSS")
cluster_stream(Stream(), 20, seed=0, sketch_width=width, restarts=2, max_iter=5)
print(status("VmHWM") - before)
"""


def peak(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """Growth of the peak resident memory from one number of samples to the next."""
    features, width = 16384, 2048
    rows = (2000, 4000, 8000)
    peaks = []
    for number in rows:
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(number), str(features), str(width)],
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
                "OMP_NUM_THREADS": "1",
                # Blocks go back to the system when they are freed; else what lies free in the heap hides some of them.
                "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(1024 * int(done.stdout))
    growth = [
        (after - before) / (more - less) / (4 * width)
        for less, more, before, after in zip(rows, rows[1:], peaks, peaks[1:], strict=False)
    ]
    print(
        f"peak memory at F = {features}, w = {width}: "
        + ", ".join(f"N = {n}: {p / 2**20:.0f} MiB" for n, p in zip(rows, peaks, strict=True))
        + f"; growth per sample, in sketches: {', '.join(f'{one:.2f}' for one in growth)} "
        f"(a point: {features / width:g})",
        flush=True,
    )
    # The sketch, the half as wide image that k-means++ draws by, and its centred copy.
    return [Number.at_most("peak memory: sketches per sample", max(growth), 2.25)], {
        "rows": rows,
        "peaks": peaks,
    }


# ------------------------------------------------------------------------------------------------ step


def step(options: argparse.Namespace) -> tuple[list[Number], dict[str, Any]]:
    """One assignment and update at F = 98,304, K = 100."""
    sizes = Sizes(rows=LENGTH, width=768, centroids=CLUSTERS, points=options.points)
    device = torch.device("cpu")
    clock = harness.make_clock(device)
    settings = Settings(device, torch.float32, seconds=options.seconds, min_rounds=3)
    others = ("plain", "scikit-learn", "faiss-cpu")
    rows = measure_op(
        OPS["kmeans"], [sizes], settings, clock, harness.ceilings(device, clock), providers=("ours", *others)
    )
    found = {row.provider: row for row in rows}
    ours = found["ours"]
    numbers: list[Number] = []
    facts: dict[str, Any] = {}
    for row in rows:
        reason = row.reason or ""
        if row.samples:
            facts[row.provider] = row.samples
            print(
                f"N={options.points} {row.provider}: {harness.spread(row.samples).median:.3f} s {reason}",
                flush=True,
            )
        else:
            print(f"N={options.points} {row.provider}: {row.status} {reason}", flush=True)
    if not ours.samples:
        return [Number("one step: ours", float("nan"), "runs", False)], facts
    print("the machine was busy: times are not to be trusted" if ours.noisy else "the machine was quiet")
    for name in others:
        if found[name].samples:
            ratio = harness.ratio(found[name].samples, ours.samples).median
            numbers.append(Number.at_least(f"one step: {name} / ours", ratio, 1))
    points = 4 * options.points * sizes.rows * sizes.width
    extra = (ours.peak_bytes or 0) / points
    numbers.append(Number.at_most("one step: peak memory / points", 1 + extra, 1.3))
    return numbers, facts


# ------------------------------------------------------------------------------------------------ main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a number is missed")
    parser.add_argument("--quick", action="store_true", help="few samples and points: does it run at all")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--glue", type=Path, default=ROOT.parent / "shared" / "glue", metavar="DIR")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of quality and widths, comma-separated")
    parser.add_argument("--samples", type=int, help="training samples of a task at most; all by default")
    parser.add_argument("--released-samples", type=int, default=160, help="of the comparison with it")
    parser.add_argument("--points", type=int, default=4096, help="N of one step")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with the released procedure")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the timing of one step")
    parser.add_argument("--threads", type=int, help="of torch; as many as it chooses by default")
    return parser


def _options(argv: Sequence[str]) -> argparse.Namespace:
    options = _parser().parse_args(argv)
    if options.quick:
        options.samples = min(options.samples or 200, 200)
        options.released_samples = min(options.released_samples, CLUSTERS)
        options.points = min(options.points, 256)
        options.rounds, options.seconds = 1, 1.0
    if options.samples is not None and options.samples < CLUSTERS:
        raise SystemExit(f"--samples: expected at least the {CLUSTERS} clusters, got {options.samples}")
    options.tasks = options.tasks.split(",")
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        raise SystemExit(f"--tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    missing = [
        name for name in options.tasks if TASKS[name] and not (options.glue / str(TASKS[name])).is_dir()
    ]
    if missing:
        print(f"not measured, no data in {options.glue}: {', '.join(missing)}")
        options.tasks = [name for name in options.tasks if name not in missing]
    return options


def main(argv: Sequence[str]) -> int:
    """Measure; return 1 where ``--check`` finds a number missed, else 0."""
    options = _options(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    parts: dict[str, Callable[[argparse.Namespace], tuple[list[Number], dict[str, Any]]]] = {
        "quality": quality,
        "widths": widths,
        "build": build,
        "peak": peak,
        "step": step,
    }
    numbers: list[Number] = []
    facts: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    facts["threads"] = torch.get_num_threads()
    # The table of widths is for the documentation and holds no number.
    chosen = options.part or [part for part in PARTS if part != "widths"]
    for part in chosen:
        if part == "build" and not (options.glue / "RTE").is_dir():
            print(f"build: not measured, no RTE in {options.glue}")
            continue
        own, facts[part] = parts[part](options)
        numbers += own
    if numbers:
        table = [["number", "measured", "must be", ""]]
        table += [
            [one.name, f"{one.value:.4g}", one.limit, "holds" if one.passed else "MISSED"] for one in numbers
        ]
        print(aligned(table))
    if options.json is not None:
        facts["numbers"] = [one._asdict() for one in numbers]
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 1 if options.check and not all(one.passed for one in numbers) else 0
