"""``fsd-fast cache``: run the teacher over a training set once and keep what it computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from fsd_fast.cache.teacher_cache import TeacherCache
from fsd_fast.commands._common import TaskData, Work, check_model, load_data, read_task
from fsd_fast.commands._teacher import CacheArguments, OpenedTeacher, open_teacher, writer_lock
from fsd_fast.commands.flags import DataArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.data import LENGTH_COLUMN, SAMPLE_COLUMN, resolve_model
from fsd_fast.distributed import Collectives
from fsd_fast.models.caching import compute_batch
from fsd_fast.models.layers import parse_layers
from fsd_fast.models.loading import load_tokenizer, read_config


@dataclass(kw_only=True)
class FillArguments(CacheArguments):
    """The ``cache`` command: the teacher's outputs for the training set, for later runs of memory and distill."""

    teacher_model_name_or_path: str = flag("The fine-tuned teacher.")
    teacher_cache_dir: str = flag(
        "Folder of the cache. What is there is checked, and what is missing is added.", writes=True
    )
    layers: str = flag(
        "Hidden states to keep: 'penultimate', 'all', or a list such as '0,3,5', where 0 is the embeddings.",
        "penultimate",
    )
    per_device_batch_size: int = flag("Samples of one teacher pass.", 32, numbers=Range(minimum=1))
    use_cpu: bool = flag("Use the CPU even where there is a GPU.", False)


ARGUMENTS = (DataArguments, FillArguments)


def prepare(data_arguments: DataArguments, arguments: FillArguments) -> Work:
    """Check the input; return the work that fills the cache."""
    task, splits = read_task(data_arguments)
    path = resolve_model(arguments.teacher_model_name_or_path)
    layers = parse_layers(arguments.layers, int(read_config(path).num_hidden_layers))
    tokenizer = load_tokenizer(path)
    check_model(path, tokenizer, task, data_arguments.max_seq_length)
    data = load_data(data_arguments, task, splits, tokenizer)
    device = PartialState(cpu=arguments.use_cpu).device
    teacher = open_teacher(path, data, data_arguments, arguments, layers, device=device)
    assert teacher.cache is not None
    return functools.partial(_fill, teacher, teacher.cache, data, arguments.per_device_batch_size, device)


def _fill(
    teacher: OpenedTeacher, cache: TeacherCache, data: TaskData, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Compare every checksum, then compute what is missing; return how much that was."""
    collectives = Collectives()
    show = functools.partial(tqdm, unit="sample", disable=collectives.rank > 0)
    held = cache.identity.num_samples - len(cache.missing())
    if held:
        for _ in show(cache.verify(), desc="cache: checking", total=held):
            pass
    computed = 0
    with writer_lock(cache, required=True):
        samples = _share(cache.missing(), data, collectives)
        with show(desc="cache: teacher", total=len(samples)) as bar:
            for index in samples.split(batch_size) if len(samples) else ():
                inputs = data.collator([data.train[place] for place in index.tolist()])
                inputs = {name: value.to(device) for name, value in inputs.items() if name != SAMPLE_COLUMN}
                compute_batch(teacher.load(), cache, inputs, index)
                computed += len(index)
                bar.update(len(index))
        total = sum(collectives.gather_sizes(computed))
        if total and collectives.rank == 0:
            cache.scan()
            cache.remove_useless()
    return {
        "cache_samples": float(cache.identity.num_samples),
        "cache_computed": float(total),
        "cache_bytes": float(sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))),
    }


def _share(missing: Tensor, data: TaskData, collectives: Collectives) -> Tensor:
    """This process's share of the samples, in order of length, so that little is padded."""
    lengths = np.asarray(data.train[LENGTH_COLUMN])[missing.numpy()]
    order = torch.from_numpy(np.argsort(lengths, kind="stable"))
    return missing[order][collectives.rank :: collectives.world_size]
