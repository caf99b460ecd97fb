"""What a model costs: parameters, bytes on disk, latency of one sample, throughput of batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fsd_fast.models.inputs import input_arguments
from fsd_fast.models.student import parameter_count
from fsd_fast.models.teacher import Teacher

_WARM_UP = 2


def measure_cost(
    models: dict[str, Teacher], single: Sequence[dict[str, Tensor]], batches: Sequence[dict[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Measure models side by side, so that a machine that slows down slows all of them down.

    Args:
        models: Name -> model, on the device of the inputs.
        single: Inputs of one sample each.
        batches: Inputs of several samples each.

    Returns:
        Name -> "parameters"; "disk_bytes" of its weights, 0 where it is not in a folder; "latency_ms", the median time
        of one sample; "samples_per_second" over the batches.
    """
    figures = {
        name: {
            "parameters": float(parameter_count(model.model)),
            "disk_bytes": float(_disk_bytes(model.name)),
        }
        for name, model in models.items()
    }
    for key, inputs in (("latency", single), ("throughput", batches)):
        times: dict[str, list[float]] = {name: [] for name in models}
        for number, each in enumerate([*inputs[:_WARM_UP], *inputs]):
            for name, model in models.items():
                seconds = _seconds(model, each)
                if number >= len(inputs[:_WARM_UP]):
                    times[name].append(seconds)
        samples = sum(len(each["input_ids"]) for each in inputs)
        for name, measured in times.items():
            if key == "latency":
                figures[name]["latency_ms"] = 1000 * statistics.median(measured)
            else:
                figures[name]["samples_per_second"] = samples / sum(measured)
    return figures


def _seconds(model: Teacher, inputs: dict[str, Tensor]) -> float:
    on_gpu = model.model.device.type == "cuda"
    start = time.perf_counter()
    with torch.inference_mode():
        model.model(**input_arguments(inputs))
        if on_gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - start


def _disk_bytes(name: str) -> int:
    folder = Path(name)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
