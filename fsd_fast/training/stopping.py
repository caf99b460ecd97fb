"""Stops a training run at the end of a step when a signal asks for it, with a checkpoint of that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fsd_fast.distributed import LateAny
from fsd_fast.shutdown import SIGNALS, Stopped, stop_requested


class StopAtSignal(TrainerCallback):
    """Saves a checkpoint and raises ``Stopped`` once a signal has asked any process of the run to stop.

    All processes stop at the same step: they exchange their requests at the end of each one, and act on them one step
    later, so that no step waits for the exchange. After the last step there is nothing to stop.

    A step at which the run would evaluate is evaluated, as the best checkpoint depends on it.
    """

    def __init__(self) -> None:
        self._exchange: LateAny | None = None
        self._stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Begin to exchange requests."""
        self._exchange, self._stopping = LateAny(), False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Ask Trainer for a checkpoint where any process is to stop."""
        assert self._exchange is not None
        requested = self._exchange.exchange(stop_requested() is not None)
        if not requested or state.global_step >= state.max_steps:
            return
        self._stopping = control.should_training_stop = control.should_log = True
        # A run that keeps the weights alone could not go on from them.
        args.save_only_model = False
        # At the end of an epoch Trainer logs, evaluates and saves in ``on_epoch_end``, as it does without the signal.
        control.should_save = control.should_save or not float(state.epoch or 0).is_integer()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Ask Trainer for a checkpoint where the epoch ends with the step that is the last for now."""
        if self._stopping:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Leave the training loop, now that the checkpoint is there."""
        if self._stopping:
            if self._exchange is not None:
                self._exchange.finish()
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            raise Stopped(
                # Where the signal reached another process alone, it was mostly the first of these.
                stop_requested() or SIGNALS[0],
                f"step {state.global_step} of {state.max_steps}, saved in {folder}; the same command with "
                "--resume_from_checkpoint auto continues",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Wait for the exchange of the last step."""
        if self._exchange is not None:
            self._exchange.finish()
