"""The memories of a distillation: their flags, the teacher's from its folder, and the student's at its start."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from fsd_fast.commands._common import TaskData
from fsd_fast.commands.flags import LEARNING_RATES, DataArguments, RunArguments, flag
from fsd_fast.commands.values import Range
from fsd_fast.losses import METHODS
from fsd_fast.memory.features import memory_identity
from fsd_fast.memory.start import check_training_set, start_from_clusters
from fsd_fast.memory.student_memory import StudentMemory
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.teacher import TeacherDescription


@dataclass
class StudentMemoryArguments:
    """The memories that L_G reads: the teacher's, and how the student's starts and is trained."""

    memory_path: str | None = flag("Folder that 'memory' wrote; needed by fsd_g and fsd_ilg.", None)
    student_memory_init: Literal["clusters", "normal", "teacher"] = flag(
        "Start of the student memory. clusters: the means of the student's own features over the teacher's clusters. "
        "normal: random numbers (the paper). teacher: the teacher's centroids (same width only).",
        "clusters",
    )
    student_memory_update: Literal["gradient", "ema"] = flag(
        "How the student memory is trained. gradient: by L_G (the paper). ema: each centroid is the running mean of "
        "the student's features in its cluster.",
        "gradient",
    )
    student_memory_decay: float = flag(
        "ema: weight that a centroid keeps for each new sample of its cluster.",
        0.95,
        numbers=Range(above=0, below=1),
    )
    memory_learning_rate: float = flag(
        "gradient: initial learning rate of the student memory; it falls linearly to 0. The paper's is the student's, "
        "under which a memory hardly moves.",
        3e-2,
        numbers=LEARNING_RATES,
    )


@dataclass(frozen=True)
class Memories:
    """What L_G compares.

    Attributes:
        teacher: The teacher's memory.
        student: The student's, at its start unless ``start`` sets it.
        start: Sets the start of the student's memory once training begins; None: it is there already.
    """

    teacher: TeacherMemory
    student: StudentMemory
    start: Callable[[], None] | None = None

    def with_start(
        self, arguments: StudentMemoryArguments, data: TaskData, run: RunArguments, student: PreTrainedModel
    ) -> Memories:
        """These memories, and what sets the start where that needs the student's features.

        Raises:
            ValueError: The memory was built on another training set.
        """
        if arguments.student_memory_init != "clusters":
            return self
        check_training_set(self.teacher, data.train, str(arguments.memory_path))
        start = functools.partial(
            start_from_clusters,
            self.student,
            self.teacher,
            student,
            data.train,
            data.collator,
            batch_size=run.per_device_eval_batch_size,
            device=run.device,
        )
        return replace(self, start=start)


def check_memory_flags(arguments: StudentMemoryArguments, method: str, run: RunArguments) -> None:
    """Check that there is a memory, and that the optimizer and the precision suit it."""
    if arguments.memory_path is None:
        users = ", ".join(name for name, entry in METHODS.items() if "memory_path" in entry.settings)
        raise ValueError(
            f"memory_path: methods {users} need a teacher memory; build one with the 'memory' command, "
            f"got method {method!r} without --memory_path"
        )
    # An optimizer of DeepSpeed's configuration takes all parameters as one group; Trainer's own has one without decay.
    deepspeed = getattr(run, "hf_deepspeed_config", None)
    if run.weight_decay and deepspeed is not None and "optimizer" in deepspeed.config:
        raise ValueError(
            f"weight_decay: the optimizer of the DeepSpeed configuration would let the student memory decay too, got "
            f"{run.weight_decay}; take its 'optimizer' out, as in ds_config.json, and Trainer's AdamW is used"
        )
    if arguments.student_memory_update == "ema" and deepspeed is not None and (run.bf16 or run.fp16):
        raise ValueError(
            "student_memory_update: DeepSpeed would keep the running means in half precision, where small updates are "
            "lost; expected 'gradient', or no --bf16 and no --fp16"
        )


def open_memories(
    arguments: StudentMemoryArguments,
    data_arguments: DataArguments,
    data: TaskData,
    run: RunArguments,
    teacher: TeacherDescription,
    student: PreTrainedModel,
    fresh: bool,
) -> Memories:
    """Load the teacher's memory and make the student's; ``fresh`` unless a checkpoint will hold that.

    Raises:
        ValueError: The teacher's memory is damaged or another run's, or does not suit the student.
    """
    memory = TeacherMemory.from_pretrained(str(arguments.memory_path))
    expected = memory_identity(
        teacher,
        data.task,
        data_arguments.max_seq_length,
        data_arguments.pad_features,
        memory.identity.num_centroid,
    )
    memory.identity.check(expected, str(arguments.memory_path))
    student_memory = StudentMemory(
        memory.identity.num_centroid,
        data_arguments.max_seq_length,
        int(student.config.hidden_size),
        init="normal" if arguments.student_memory_init == "clusters" else arguments.student_memory_init,
        teacher_memory=memory,
        generator=torch.Generator().manual_seed(run.seed),
        decay=arguments.student_memory_decay if arguments.student_memory_update == "ema" else None,
        pad_features=data_arguments.pad_features,
    )
    memories = Memories(memory, student_memory)
    return memories.with_start(arguments, data, run, student) if fresh else memories
