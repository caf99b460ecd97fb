r"""The built-in tasks `reviews` and `reviews-score`, from movie-review sentences rated by people.

Each line of the file is `id \t mean rating \t text`, the rating from -4 (very negative) to 4 (very positive).

- `reviews`: label = [rating > 0]; sentences whose mean rating is exactly 0 are left out.
- `reviews-score`: label = rating.

Split: with h the first 8 bytes of sha256(normalised text), big-endian, a sentence is in `validation` if
h mod 10 = 0 and in `train` otherwise. The split thus depends on the sentence alone: it is the same on every
machine and for both tasks, and copies of a sentence are never on both sides. The file is sorted by class; rows
come in order of h, so that the first n of a split are a fair sample of it.
"""

import hashlib

from datasets import Dataset, DatasetDict

from fsd_fast.data.builtin import reviews_path
from fsd_fast.data.glue import to_dataset
from fsd_fast.data.tasks import get_task


def text_hash(text: str) -> int:
    """The number h of a sentence, 64 bits.

    Args:
        text: The sentence. White space and letter case make no difference.
    """
    normalised = " ".join(text.split()).lower()
    return int.from_bytes(hashlib.sha256(normalised.encode("utf-8")).digest()[:8], "big")


def is_validation(text: str) -> bool:
    """Whether a sentence belongs to the validation split."""
    return text_hash(text) % 10 == 0


def load_reviews(score: bool) -> DatasetDict:
    """Load the built-in task.

    Args:
        score: False for `reviews` (two classes), True for `reviews-score` (a regression).

    Returns:
        `train` and `validation`, with the columns `sentence`, `label` and `idx`.

    Raises:
        FileNotFoundError: If the data has not been fetched.
        ValueError: If the file is not the one that was fetched.
    """
    task = get_task("reviews-score" if score else "reviews")
    rows: dict[str, list[tuple[str, int | float]]] = {"train": [], "validation": []}
    with reviews_path().open(encoding="utf-8", newline="\n") as file:
        for line in file:
            _, rating_text, text = line.rstrip("\r\n").split("\t")
            rating = float(rating_text)
            if not score and rating == 0:
                continue
            split = "validation" if is_validation(text) else "train"
            rows[split].append((text, rating if score else int(rating > 0)))

    for part in rows.values():
        part.sort(key=lambda row: text_hash(row[0]))

    def dataset(split: str) -> Dataset:
        return to_dataset(
            task, {"sentence": [t for t, _ in rows[split]]}, [label for _, label in rows[split]]
        )

    return DatasetDict({split: dataset(split) for split in rows})
