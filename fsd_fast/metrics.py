"""The metrics of GLUE, computed offline with scikit-learn and SciPy.

With predictions p and labels y over N samples:

- accuracy: mean of [p = y]; f1: harmonic mean of precision and recall of class 1
- matthews_correlation: correlation of p and y as 0/1 variables
- pearson, spearmanr: correlation of p and y, and of their ranks
- combined_score: the mean of a task's metrics, where it has more than one

Fidelity compares a student's outputs with its teacher's on the same samples, whatever the labels are:

- teacher_agreement: mean of [argmax z_S = argmax z_T]; for a regression the Pearson correlation of both outputs
- teacher_kl: mean KL(softmax(z_T) || softmax(z_S)) in nats; classifications only
- teacher_mse: mean (z_S - z_T)^2; regressions only

Classes are predicted as the argmax of the logits `[N, C]`; a regression's score is its one logit.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fsd_fast.data.tasks import Task

MAIN_METRIC = "main"
"""Stands for a task's main metric until the task is known."""

_Array = npt.NDArray[np.float64]


def _correlation(name: str, predictions: _Array, labels: _Array) -> float:
    # The correlation with a constant is 0/0. A model that predicts one value for everything explains nothing,
    # so it is scored 0 and a run that collapsed can still be compared, logged and saved as JSON.
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    correlation = pearsonr if name == "pearson" else spearmanr
    return float(correlation(predictions, labels).statistic)


def main_metric_first(task: Task) -> list[str]:
    """Names of what ``compute_metrics`` returns, the task's main score first: the mean where there are several."""
    return ["combined_score", *task.metrics] if len(task.metrics) > 1 else list(task.metrics)


def hard_label_loss(task: Task, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean loss of all samples on the hard labels, in float64.

        classes      mean_i -log softmax(z_i)[y_i]
        regression   mean_i (z_i - y_i)^2

    Args:
        task: Tells classes from a regression.
        predictions: Logits `[N, C]`; for a regression scores `[N, 1]` or `[N]`.
        labels: Class numbers `[N]`, or scores `[N]`.
    """
    logits = np.asarray(predictions, dtype=np.float64)
    truth = np.asarray(labels)
    if task.is_regression:
        return float(np.mean((logits.reshape(truth.shape) - truth) ** 2))
    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(truth.size), truth.astype(np.int64)]))


def compute_metrics(task: Task, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """Score predictions.

    Args:
        task: Says which metrics to compute.
        predictions: Logits `[N, C]`; for a regression scores `[N, 1]` or `[N]`.
        labels: Class numbers `[N]`, or scores `[N]` for a regression.

    Returns:
        The task's metrics by name, and `combined_score`, their mean, if there is more than one. All are
        finite: a correlation where predictions or labels are constant is 0, and so are F1 and Matthews
        correlation where one class alone occurs and they would be 0/0.

    Raises:
        ValueError: If the shapes do not fit, there are no samples, a prediction or a label is NaN or
            infinite, or a label is not a class of the task.
    """
    scores = np.asarray(predictions, dtype=np.float64)
    truth = np.asarray(labels, dtype=np.float64)
    if task.is_regression and scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if truth.ndim != 1 or truth.size == 0:
        raise ValueError(f"labels has the shape {list(truth.shape)}; expected [N] with at least one sample")
    expected = (truth.size,) if task.is_regression else (truth.size, task.num_labels)
    if scores.shape != expected:
        raise ValueError(f"predictions has the shape {list(scores.shape)}; expected {list(expected)}")
    for name, values in (("predictions", scores), ("labels", truth)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name} of task {task.name!r} hold NaN or infinite values; expected finite ones"
            )

    if task.is_regression:
        result = {name: _correlation(name, scores, truth) for name in task.metrics}
    else:
        if not np.isin(truth, np.arange(task.num_labels)).all():
            raise ValueError(f"labels of task {task.name!r} are not all in 0..{task.num_labels - 1}")
        predicted, classes = scores.argmax(axis=1), truth.astype(np.int64)
        compute = {
            "accuracy": lambda: accuracy_score(classes, predicted),
            "f1": lambda: f1_score(classes, predicted, zero_division=0.0),
            "matthews_correlation": lambda: matthews_corrcoef(classes, predicted),
        }
        result = {name: float(compute[name]()) for name in task.metrics}
    if len(result) > 1:
        result["combined_score"] = float(np.mean(list(result.values())))
    return result


def fidelity(task: Task, student: npt.ArrayLike, teacher: npt.ArrayLike) -> dict[str, float]:
    """Compare a student's predictions with its teacher's, in float64.

        teacher_agreement   mean_i [argmax z_S,i = argmax z_T,i]; regression: Pearson correlation of z_S and z_T
        teacher_kl          mean_i sum_c p_T,ic (log p_T,ic - log p_S,ic), p = softmax(z)
        teacher_mse         mean_i (z_S,i - z_T,i)^2

    Args:
        task: Tells classes from a regression.
        student: Logits `[N, C]`; for a regression `[N, 1]` or `[N]`.
        teacher: Logits of the same samples in the same order.

    Returns:
        The agreement, and the divergence that suits the task.

    Raises:
        ValueError: The shapes differ, there are no samples, or an output is NaN or infinite.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (student, teacher))
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(
            f"student, teacher: expected outputs of the same samples, got {list(ours.shape)} and {list(theirs.shape)}"
        )
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError(f"outputs of task {task.name!r} hold NaN or infinite values; expected finite ones")
    if task.is_regression:
        ours, theirs = ours.reshape(-1), theirs.reshape(-1)
        return {
            "teacher_agreement": _correlation("pearson", ours, theirs),
            "teacher_mse": float(np.mean((ours - theirs) ** 2)),
        }
    log_student, log_teacher = log_softmax(ours, axis=1), log_softmax(theirs, axis=1)
    divergence = (np.exp(log_teacher) * (log_teacher - log_student)).sum(axis=1)
    return {
        "teacher_agreement": float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
        "teacher_kl": float(np.mean(divergence)),
    }
