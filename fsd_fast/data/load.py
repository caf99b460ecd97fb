"""One way to the data of every task: built in, from a folder of official files, or from the Hub."""

from pathlib import Path

import datasets
from datasets import DatasetDict

from fsd_fast.data.glue import read_glue_folder, read_glue_test
from fsd_fast.data.reviews import load_reviews
from fsd_fast.data.tasks import Task

HUB_DATASET = "nyu-mll/glue"


def load_task_dataset(task: Task, data_dir: str | Path | None = None) -> DatasetDict:
    """Load the labelled splits of a task.

    Args:
        task: The task.
        data_dir: Folder of the official GLUE files (see `read_glue_folder`). None takes a GLUE task from
            the Hub. The built-in tasks take no folder.

    Returns:
        `train` and the task's `eval_splits`, each with the columns `task.text_columns`, `label` and `idx`.

    Raises:
        ConnectionError: If the Hub cannot be reached; the message says what to do.
        FileNotFoundError: If a file is missing in `data_dir`, or the built-in data has not been fetched.
        ValueError: If a file is damaged, or `data_dir` is given for a built-in task.
    """
    if task.folder is None:
        if data_dir is not None:
            raise ValueError(
                f"data_dir was {str(data_dir)!r}, but task {task.name!r} is built in; leave it out"
            )
        return load_reviews(score=task.is_regression)
    if data_dir is not None:
        return read_glue_folder(task, data_dir)
    # The test splits carry no labels.
    splits = _from_hub(task)
    return DatasetDict({split: splits[split] for split in ("train", *task.eval_splits)})


def load_task_test(task: Task, data_dir: str | Path | None = None) -> DatasetDict:
    """Load the test splits of a task, without labels.

    Args:
        task: A GLUE task.
        data_dir: Folder of the official GLUE files; None takes them from the Hub.

    Returns:
        "test", or for MNLI "test_matched" and "test_mismatched", with the columns `task.text_columns` and `idx`.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        FileNotFoundError: If a file is missing in `data_dir`.
        ValueError: If a file is damaged, or the task is a built-in one, which has no test set.
    """
    if task.folder is None:
        raise ValueError(f"task_name: {task.name!r} has no test set; expected a GLUE task, or --test_file")
    if data_dir is not None:
        return read_glue_test(task, data_dir)
    splits = _from_hub(task)
    names = [split.replace("validation", "test") for split in task.eval_splits]
    return DatasetDict({name: splits[name].remove_columns("label") for name in names})


def _from_hub(task: Task) -> DatasetDict:
    try:
        return datasets.load_dataset(HUB_DATASET, task.name)
    except OSError as error:  # ConnectionError, and FileNotFoundError when the Hub does not know the name
        raise ConnectionError(
            f"could not load task {task.name!r} from {HUB_DATASET} on the Hugging Face Hub ({error}); "
            f"without the Hub, pass --data_dir with the folder of the official GLUE files"
        ) from error
