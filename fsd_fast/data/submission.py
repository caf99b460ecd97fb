r"""Predictions as files: the form that GLUE's server takes, and CSV with probabilities for data of one's own.

A submission has one file for each task, ``index \t prediction`` with a header, rows in the order of the test file:

    CoLA.tsv SST-2.tsv MRPC.tsv QQP.tsv WNLI.tsv     class numbers
    MNLI-m.tsv MNLI-mm.tsv QNLI.tsv RTE.tsv          class names
    STS-B.tsv                                        scores from 0 to 5, three decimals
"""

import csv
import io

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from fsd_fast.data.tasks import Task

_NAMED = ("mnli", "qnli", "rte")
_MNLI = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}
OWN_FILE = "predictions.csv"


def submission_name(task: Task, split: str) -> str:
    """Name of the file that a submission has for a test split of a GLUE task."""
    return f"{_MNLI.get(split, task.folder)}.tsv"


def submission(task: Task, logits: npt.ArrayLike) -> str:
    """Content of a submission's file.

    Args:
        task: A GLUE task.
        logits: [N, C] in the order of the test file; [N, 1] for a regression.

    Raises:
        ValueError: An output is NaN or infinite.
    """
    outputs = _finite(logits)
    if task.score_range is not None:
        predictions = [f"{score:.3f}" for score in np.clip(outputs[:, 0], *task.score_range)]
    else:
        classes = outputs.argmax(axis=1)
        named = task.name in _NAMED
        predictions = [task.labels[number] if named else str(number) for number in classes]
    lines = ["index\tprediction", *(f"{index}\t{each}" for index, each in enumerate(predictions))]
    return "\n".join(lines) + "\n"


def predictions_csv(task: Task, logits: npt.ArrayLike) -> str:
    """CSV of predictions for data of one's own.

    Args:
        task: The task.
        logits: [N, C] in the order of the file; [N, 1] for scores.

    Returns:
        ``index,prediction`` and, for classes, ``probability_NAME`` for each: softmax of the logits.

    Raises:
        ValueError: An output is NaN or infinite.
    """
    outputs = _finite(logits)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "prediction", *(f"probability_{label}" for label in task.labels)])
    for index, (output, chances) in enumerate(zip(outputs, softmax(outputs, axis=1), strict=True)):
        if task.is_regression:
            writer.writerow([index, f"{output[0]:.6g}"])
        else:
            writer.writerow(
                [index, task.labels[int(output.argmax())], *(f"{chance:.6f}" for chance in chances)]
            )
    return text.getvalue()


def _finite(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    outputs = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(outputs).all():
        raise ValueError("predictions hold NaN or infinite values; expected finite ones")
    return outputs
