"""Stop a training run that no longer gets better, in a way that a resumed run goes on with."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """Stops after ``patience`` evaluations in a row whose metric was no better than the best one.

    The count is part of every checkpoint, and a resumed run takes it up: it stops where it would have without the
    interruption. Evaluations of splits that do not report the metric (MNLI has two) count neither way.

    Args:
        early_stopping_patience: Evaluations without an improvement.
        early_stopping_threshold: How much better than the best one the metric must be to count as an improvement.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Take up the count of the checkpoint that the run continues from."""
        super().on_train_begin(args, state, control, **keywords)
        callbacks: Any = state.stateful_callbacks  # by name, once a checkpoint was read
        stored = callbacks.get(type(self).__name__, {}) if isinstance(callbacks, dict) else {}
        if isinstance(stored, dict) and state.global_step:
            self.early_stopping_patience_counter = int(
                stored.get("attributes", {}).get("early_stopping_patience_counter", 0)
            )

    def on_evaluate(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **keywords: Any,
    ) -> None:
        """Count an evaluation that reports the metric."""
        name = str(args.metric_for_best_model)
        if f"eval_{name.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **keywords)


def early_stopping(patience: int | None, threshold: float) -> list[EarlyStopping]:
    """The callbacks of a trainer: one, or none where ``patience`` is None."""
    return [] if patience is None else [EarlyStopping(patience, threshold)]
