"""transformers' Trainer with exact losses: ``ClassifierTrainer`` for hard labels, ``FSDTrainer`` for distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from fsd_fast.data import LENGTH_COLUMN, SAMPLE_COLUMN
from fsd_fast.files import named_write_errors
from fsd_fast.losses import Signals
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.sections import section
from fsd_fast.training.distillation import DistillationModel
from fsd_fast.training.finite import FiniteCheck
from fsd_fast.training.manifest import break_seal, checkpoint_folders, remove_checkpoint, seal_checkpoint
from fsd_fast.training.profile import StepProfile, time_steps
from fsd_fast.training.sampling import SeededLengthGroups
from fsd_fast.training.stopping import StopAtSignal
from fsd_fast.training.teacher_source import TeacherSource
from fsd_fast.training.throughput import Throughput


class ClassifierTrainer(Trainer):
    """Trains or evaluates a classifier whose loss is a mean over the batch.

    Everything but the following is Trainer's: the loop, DeepSpeed, resuming, logging, checkpoints.

    - A step of ``gradient_accumulation_steps`` micro-batches of b samples has the loss and the gradient of one batch
      of ``gradient_accumulation_steps * b`` samples, on any number of processes. Trainer takes a forward with
      ``**kwargs`` for one that normalises its own loss by the number of items; a classifier's does not.
    - The evaluation loss is computed by ``compute_metrics`` from the logits and labels of all samples, so it does not
      depend on how they are spread over batches and processes.
    - ``dataloader_drop_last`` drops samples of the training set alone; Trainer would drop them from the evaluation too.
    - A checkpoint counts once its manifest is written; only then are older ones removed, see ``manifest``.
    - Training stops at the first loss or gradient norm that is not finite, see ``FiniteCheck``.
    - The order of samples under ``group_by_length`` depends on seed and epoch alone, see ``SeededLengthGroups``.
    - A signal stops it at the end of a step, with a checkpoint, see ``StopAtSignal``.
    - Evaluation changes no random number of the training, so that it may be more or less often.
    - The log and the results of training say how fast the steps went, see ``Throughput``.

    Args:
        *arguments: As for Trainer.
        profile_steps: Optimizer steps to profile, see ``StepProfile``; None: none.
        **keywords: As for Trainer.
    """

    def __init__(self, *arguments: Any, profile_steps: int | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.model_accepts_loss_kwargs = False
        self.finite = FiniteCheck(str(self.args.output_dir))
        self.add_callback(self.finite)
        self.add_callback(StopAtSignal())
        self.throughput = Throughput()
        self._profiles = profile_steps is not None
        if profile_steps is not None:
            self.add_callback(StepProfile(profile_steps, str(self.args.output_dir), self.args.device))
        self._train_order: SeededLengthGroups | None = None
        self._components: dict[str, Tensor] = {}
        self._sample_index: Tensor | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run forward and backward on a micro-batch and return its loss, checked to be finite."""
        places = inputs.pop(SAMPLE_COLUMN, None)
        self._sample_index = None if places is None else torch.from_numpy(places)
        self.throughput.add(inputs)
        # The forward's parts are sections of their own.
        with section("backward"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite.add(self.state.global_step + 1, "the loss", loss, self._sample_index, self._components)
        return loss

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """Fetch the micro-batches of the next optimizer step."""
        with section("data"):
            return super().get_batch_samples(*arguments, **keywords)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer; its steps are a section of a profile."""
        optimizer = super().create_optimizer(model)
        if self._profiles:
            time_steps(optimizer)
        return optimizer

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; the figures returned say how fast the steps went, evaluation and saving left out."""
        self.throughput.restart()
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        total = self.throughput.total(self._sum_over_processes)
        result.metrics.update({f"train_step_{name}": value for name, value in total.items()})
        return result

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        """Run an epoch, unless the run goes on from its last step.

        Trainer looks at the number of steps only after one, so a run that ends inside an epoch would get one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            # Trainer does not reach the sampler of several processes when batches of the epoch are skipped.
            if self._train_order is not None:
                self._train_order.set_epoch(keywords["epoch"])
            super()._run_epoch(*arguments, **keywords)

    def _sum_over_processes(self, counts: Tensor) -> Tensor:
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum").cpu()

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Evaluate, while the clock of the throughput stands still and the training's random numbers are kept."""
        device = self.args.device
        with self.throughput.paused(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*arguments, **keywords)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the throughput since the last entry next to the loss."""
        with section("logging"):
            if "loss" in logs:
                logs = {**logs, **self.throughput.recent(self._sum_over_processes)}
            super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradient and return its norm before."""
        with section("gradient clip"):
            return self.accelerator.clip_grad_norm_(self.clipped_parameters(model), self.args.max_grad_norm)

    def clipped_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters whose gradient ``max_grad_norm`` bounds."""
        return list(model.parameters())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the norm that Trainer logs. Trainer calls this between the backward and the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        # The scaler of --fp16 looks for overflows itself, skips their steps and lowers its scale.
        if norm is not None and not self.args.fp16:
            self.finite.add(self.state.global_step + 1, "the gradient's norm", torch.as_tensor(norm))
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, while the clock of the throughput stands still; see ``_save_whole_checkpoint``."""
        with self.throughput.paused():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, then its manifest, then remove those beyond ``save_total_limit``.

        Trainer would remove old ones, by the age of any folder checkpoint-*, as soon as the new files are written.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        first = self.is_world_process_zero()
        if first:
            break_seal(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with named_write_errors(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if first:
            seal_checkpoint(folder, resumable=not self.args.save_only_model)
            if limit:
                best = self.state.best_model_checkpoint
                self._remove_old_checkpoints(folder, folder if best is None else Path(best), limit)
        self.accelerator.wait_for_everyone()

    def _remove_old_checkpoints(self, newest: Path, best: Path, limit: int) -> None:
        kept = {newest.name, best.name}
        old = [path for path in checkpoint_folders(newest.parent) if path.name not in kept]
        for path in old[: max(0, len(old) + len(kept) - max(limit, len(kept)))]:
            remove_checkpoint(path)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the training samples; grouped by length it is the same for every run that reaches the epoch."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        # A batch of all processes: its samples are the same, however many processes share it.
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._train_order = self._length_groups(dataset, batch)
        return self._train_order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The order of the evaluation samples; grouped by length it is always the same."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._length_groups(eval_dataset, self.args.eval_batch_size)

    def _length_groups(self, dataset: Any, batch_size: int) -> SeededLengthGroups:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroups(batch_size, dataset[LENGTH_COLUMN][:], seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Read all samples of an evaluation split."""
        with self._every_sample():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Read all samples whose predictions are wanted, in their order.

        Trainer would order them as the training samples, by length where these are grouped by it, and predictions could
        not be told apart.
        """
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "sequential"
        try:
            with self._every_sample():
                return super().get_test_dataloader(test_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    @contextmanager
    def _every_sample(self) -> Iterator[None]:
        """Keep ``dataloader_drop_last`` away from what is no training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return (None, logits, labels): ``compute_metrics`` computes the loss of all samples together."""
        inputs = {name: value for name, value in inputs.items() if name != SAMPLE_COLUMN}
        labels = self._prepare_inputs({"labels": inputs.pop("labels")})["labels"]
        _, logits, _ = super().prediction_step(model, inputs, False, ignore_keys)
        return None, logits, labels


class FSDTrainer(ClassifierTrainer):
    """Trains a ``DistillationModel``, with the signals of a frozen teacher added to every training batch.

    Evaluation runs the student alone.

    Args:
        *arguments: As for Trainer.
        teacher: The frozen teacher, or its cache; None where the method requires none.
        teacher_memory: The memory that the teacher's features are compared with; None where the method uses none.
        start_memory: Called before the first step of a run that is not resumed, to set where the student memory starts.
        memory_learning_rate: Initial learning rate of the student memory; None: the student's.
        **keywords: As for ``ClassifierTrainer``; ``model`` is a ``DistillationModel``.

    The student memory has a parameter group of its own, without weight decay and outside of ``max_grad_norm``: its
    entries are features, and their gradient is of another scale than the weights'. DeepSpeed clips all parameters
    together.

    Raises:
        ValueError: The method requires a teacher and there is none, or the other way round.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: TeacherSource | None,
        teacher_memory: TeacherMemory | None = None,
        start_memory: Callable[[], None] | None = None,
        memory_learning_rate: float | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.distillation: DistillationModel = self.accelerator.unwrap_model(self.model)
        requires = self.distillation.objective.requires
        if requires.teacher != (teacher is not None):
            raise ValueError(
                f"teacher: the method requires {'one' if requires.teacher else 'none'}, got {teacher}"
            )
        self.teacher = teacher
        if teacher is not None:
            half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            compiled = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            teacher.start(self.args.device, half, compiled if self.args.torch_compile else None)
        self._start_memory, self._memory_learning_rate = start_memory, memory_learning_rate
        self.teacher_memory: Tensor | None = None
        self._clusters: Tensor | None = None
        if teacher_memory is not None:
            self.teacher_memory = teacher_memory.centroids.to(self.args.device)
            self._clusters = self._cluster_table(teacher_memory)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0

    def _cluster_table(self, memory: TeacherMemory) -> Tensor | None:
        """The cluster of every training sample, for a student memory that follows the features."""
        student_memory = self.distillation.student_memory
        if student_memory is None or student_memory.decay is None:
            return None
        assert isinstance(self.train_dataset, Dataset)
        places = torch.tensor(self.train_dataset[SAMPLE_COLUMN])
        table = torch.full((int(places.max()) + 1,), -1)
        table[places] = memory.labels_of(places)
        return table

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Start the student memory, unless a checkpoint holds it, and train."""
        if self._start_memory is not None and not resume_from_checkpoint:
            self._start_memory()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def signals(self, inputs: dict[str, Tensor]) -> Signals:
        """Return what the objective requires of the teacher for a batch."""
        if self.teacher is None:
            return Signals(torch.empty(len(inputs["input_ids"]), 0, device=self.args.device), {})
        assert self._sample_index is not None
        return self.teacher.signals(inputs, self._sample_index)._replace(memory=self.teacher_memory)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the integrated loss of a micro-batch."""
        self.distillation.objective.set_progress(self.state.global_step / max(1, self.state.max_steps))
        with section("teacher"):
            signals = self.signals(inputs)
        if self._clusters is not None and self._sample_index is not None:
            clusters = self._clusters[self._sample_index]
            # From pinned memory a GPU copies without making the host wait.
            clusters = clusters.pin_memory() if self.args.device.type == "cuda" else clusters
            inputs = {**inputs, "clusters": clusters.to(self.args.device, non_blocking=True)}
        with section("student"):
            outputs = model(**inputs, teacher=signals)
        self._components = outputs["components"]
        # Added up on the device: nothing waits for it before the next log entry. A micro-batch counts as Trainer
        # counts its loss, as one of those that share an optimizer step; the last group of an epoch may be smaller.
        share = 1 / self.current_gradient_accumulation_steps
        for name, value in self._components.items():
            self._sums[name] = self._sums.get(name, 0) + value * share
        self._steps += share
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each loss component's mean over the optimizer steps since the last entry, like the loss."""
        if "loss" in logs and self._steps:
            values = torch.stack(list(self._sums.values())).float() / self._steps
            values = self.accelerator.reduce(values, reduction="mean")
            logs = {**logs, **dict(zip(self._sums, values.tolist(), strict=True))}
            self._sums, self._steps = {}, 0.0
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with the student memory in a parameter group of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        memory = self.distillation.student_memory
        centroids = [] if memory is None else list(memory.parameters())
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if all(p is not centroid for centroid in centroids)]
        if centroids:
            rate = self._memory_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": centroids, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def clipped_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The student's, whose gradient alone is clipped; that of the student memory is checked to be finite."""
        memory = self.distillation.student_memory
        for centroids in [] if memory is None else memory.parameters():
            if centroids.grad is not None and not self.args.fp16:
                norm = torch.linalg.vector_norm(centroids.grad)
                self.finite.add(self.state.global_step + 1, "the gradient of the student memory", norm)
        return list(self.distillation.student.parameters())

    def gathered_state(self) -> dict[str, Tensor] | None:
        """Gather the ``DistillationModel`` state; call it on all processes. ZeRO-3 gives it to the first alone."""
        return self.accelerator.get_state_dict(self.deepspeed if self.is_deepspeed_enabled else self.model)
