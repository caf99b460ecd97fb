"""Tasks and their data: GLUE, movie reviews, the built-in backbone, and batching."""

from fsd_fast.data.builtin import BACKBONE_NAME, backbone_path, cache_dir, fetch, resolve_model, reviews_path
from fsd_fast.data.collate import LENGTH_COLUMN, SAMPLE_COLUMN, PadCollator, tokenize
from fsd_fast.data.digest import samples_digest, tokens_digest
from fsd_fast.data.glue import read_glue_folder
from fsd_fast.data.load import load_task_dataset
from fsd_fast.data.reviews import load_reviews
from fsd_fast.data.subsets import HELDOUT, choose_rows
from fsd_fast.data.tasks import TASKS, Task, get_task

__all__ = [
    "BACKBONE_NAME",
    "HELDOUT",
    "LENGTH_COLUMN",
    "SAMPLE_COLUMN",
    "TASKS",
    "PadCollator",
    "Task",
    "backbone_path",
    "cache_dir",
    "choose_rows",
    "fetch",
    "get_task",
    "load_reviews",
    "load_task_dataset",
    "read_glue_folder",
    "resolve_model",
    "reviews_path",
    "samples_digest",
    "tokenize",
    "tokens_digest",
]
