"""``--profile N``: where the time of a training step goes, as a table and as a Chrome trace."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fsd_fast.sections import SectionTimes, record, section

TRACE_FILE = "profile_trace.json"


class StepProfile(TrainerCallback):
    """Profiles ``steps`` optimizer steps after a first one, which warms up allocators and compilers.

    The table is printed and a Chrome trace is written once the last of them is done; training goes on. On a GPU each
    section waits for the device, so that its time is its own; the steps of a profile are slower for it.

    Args:
        steps: Optimizer steps to profile, at least 1.
        output_dir: Where the trace is written, as ``profile_trace.json``.
        device: Where the model runs.
    """

    def __init__(self, steps: int, output_dir: str, device: torch.device) -> None:
        self._steps, self._path, self._device = steps, Path(output_dir) / TRACE_FILE, device
        on_gpu = device.type == "cuda"
        self.times = SectionTimes(torch.cuda.synchronize if on_gpu else None)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = torch.profiler.profile(activities=activities)
        self._running = contextlib.ExitStack()
        self._first: int | None = None
        self._started = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Begin after the first step of this process, and end ``steps`` later."""
        if self._first is None:
            self._first = state.global_step
            self._running.enter_context(self._profiler)
            self._running.enter_context(record(self.times))
            self._started = time.perf_counter()
        elif state.global_step == self._first + self._steps:
            seconds = time.perf_counter() - self._started
            self._running.close()
            if state.is_world_process_zero:
                self._profiler.export_chrome_trace(str(self._path))
                print(
                    f"\n{profile_table(self.times, seconds, self._steps)}\nwritten: {self._path}", flush=True
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Stop where training is shorter than the profile."""
        self._running.close()


def time_steps(optimizer: torch.optim.Optimizer) -> None:
    """Make the steps of an optimizer the section "optimizer"."""
    sections: list[contextlib.AbstractContextManager[None]] = []

    def before(*_: Any) -> None:
        sections.append(section("optimizer"))
        sections[-1].__enter__()

    def after(*_: Any) -> None:
        sections.pop().__exit__(None, None, None)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def profile_table(times: SectionTimes, seconds: float, steps: int) -> str:
    """Lay out the sections of ``steps`` optimizer steps that took ``seconds`` together, and the rest as "other"."""
    rows = sorted(times.seconds.items(), key=lambda row: -row[1])
    rows.append(("other", max(0.0, seconds - sum(times.seconds.values()))))
    rows.append(("step", seconds))
    width = max(len(name) for name, _ in rows)
    lines = [f"{'where a step goes':<{width}}  ms/step   share"]
    lines += [f"{name:<{width}}  {1e3 * value / steps:7.1f}  {value / seconds:6.1%}" for name, value in rows]
    return "\n".join(lines)
