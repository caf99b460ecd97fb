"""From text to batches: tokenization, and padding that fits the padding policy of the losses.

A sample has L tokens; a batch of B samples is padded to S positions. S is `max_seq_length` under "include",
where every position counts as a row of the features, and the longest L of the batch under "exclude", where
padding is dropped and so need not be made.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

from fsd_fast.data.tasks import Task

LENGTH_COLUMN = "length"
"""Number of tokens of a sample: what `TrainingArguments.length_column_name` is called by default."""
SAMPLE_COLUMN = "sample_index"
"""Place of a sample in its split, from 0: names it in messages, and finds what was stored for it."""

_CUT_COLUMN = "cut"


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_seq_length: int,
    *,
    labelled: bool = True,
) -> tuple[Dataset, int]:
    """Tokenize one split, truncated and not padded.

    Args:
        dataset: N rows with the columns `task.text_columns` and `label`.
        tokenizer: The tokenizer of the teacher and the student.
        task: Names the text columns.
        max_seq_length: Largest number of tokens S of a sample, special tokens included.
        labelled: Whether there is a column `label`; a test set has none.

    Returns:
        N rows with the tokenizer's columns (`input_ids`, `attention_mask`, and `token_type_ids` where it has
        them), `labels` where there are any, `sample_index`, the row's place, and `length`, the number of
        tokens, by which `TrainingArguments(train_sampling_strategy="group_by_length")` sorts. Trainer drops
        the column before it looks for it unless `remove_unused_columns=False`, and then counts the tokens
        itself. Beside them the number of samples that were cut.

    Raises:
        ValueError: If `max_seq_length` leaves no room for text or exceeds what the tokenizer's model takes,
            or if a column is missing.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    limit = tokenizer.model_max_length
    if not special < max_seq_length <= limit:
        raise ValueError(
            f"max_seq_length is {max_seq_length}; expected more than the {special} special tokens of a "
            f"sample and at most {limit}, the longest input of the model"
        )
    missing = {*task.text_columns, *(["label"] if labelled else [])} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"dataset has the columns {dataset.column_names}; task {task.name!r} also expects "
            f"{sorted(missing)}"
        )

    def encode(rows: dict[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        texts = [rows[name] for name in task.text_columns]
        batch = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        encoded = {**batch, _CUT_COLUMN: _are_cut(batch, tokenizer, texts)}
        if labelled:
            encoded["labels"] = rows["label"]
        encoded[SAMPLE_COLUMN] = places
        encoded[LENGTH_COLUMN] = [len(ids) for ids in encoded["input_ids"]]
        return encoded

    tokens = dataset.map(
        encode, batched=True, with_indices=True, remove_columns=dataset.column_names, desc="Tokenizing"
    )
    return tokens.remove_columns(_CUT_COLUMN), int(np.sum(tokens[_CUT_COLUMN][:], dtype=int))


def _are_cut(batch: BatchEncoding, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]]) -> list[bool]:
    """Whether each sample of a batch lost tokens."""
    if batch.encodings is not None:
        return [bool(encoding.overflowing) for encoding in batch.encodings]
    whole = tokenizer(*texts, truncation=False, verbose=False)["input_ids"]
    return [len(ids) > len(kept) for ids, kept in zip(whole, batch["input_ids"], strict=True)]


class PadCollator:
    """Pads samples to a batch.

    Args:
        tokenizer: Says with what and on which side to pad.
        pad_features: "include" pads to `max_seq_length`; "exclude" to the longest sample of the batch.
        max_seq_length: Largest S.
        pad_to_multiple_of: Round S up to a multiple of this, under "exclude"; `max_seq_length` must itself be
            one, so that S stays within it.

    Raises:
        ValueError: If `pad_features` is neither of the two, or `max_seq_length` is not a positive multiple.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_features: str,
        max_seq_length: int,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if pad_features not in ("include", "exclude"):
            raise ValueError(f"pad_features is {pad_features!r}; expected 'include' or 'exclude'")
        if max_seq_length < 1:
            raise ValueError(f"max_seq_length is {max_seq_length}; expected a positive number")
        if pad_to_multiple_of is not None and (pad_to_multiple_of < 1 or max_seq_length % pad_to_multiple_of):
            raise ValueError(
                f"pad_to_multiple_of is {pad_to_multiple_of}; expected a divisor of max_seq_length, "
                f"which is {max_seq_length}"
            )
        self.max_seq_length = max_seq_length
        self._pad = DataCollatorWithPadding(
            tokenizer,
            padding="max_length" if pad_features == "include" else "longest",
            max_length=max_seq_length,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad B samples as `tokenize` makes them.

        Returns:
            The tokenizer's tensors `[B, S]` (int64), `labels` `[B]`, int64 for classes and float32 for scores, and
            `sample_index` `[B]`, an int64 array of NumPy: the host reads it, so nothing may move it to a GPU.
            `length` is left out: the model takes no such argument.

        Raises:
            ValueError: If a sample has more than `max_seq_length` tokens.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        if longest > self.max_seq_length:
            raise ValueError(
                f"a sample has {longest} tokens; expected at most max_seq_length = {self.max_seq_length}"
            )
        kept = [
            {name: value for name, value in sample.items() if name not in (LENGTH_COLUMN, SAMPLE_COLUMN)}
            for sample in samples
        ]
        batch = self._pad(kept)
        if SAMPLE_COLUMN in samples[0]:
            batch[SAMPLE_COLUMN] = np.array([sample[SAMPLE_COLUMN] for sample in samples], dtype=np.int64)
        if "labels" in batch:
            labels = torch.as_tensor(batch["labels"])
            batch["labels"] = labels.to(torch.float32 if labels.is_floating_point() else torch.long)
        return batch
