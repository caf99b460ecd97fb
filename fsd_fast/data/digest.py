"""Digests of tokenized samples, by which a run tells that its data are other ones than those of a file or a run."""

from __future__ import annotations

import hashlib

import numpy as np
from datasets import Dataset

_COLUMNS = ("input_ids", "labels")
_HEXADECIMAL_DIGITS = 16


def samples_digest(samples: Dataset) -> str:
    """The first 16 hexadecimal digits of a sha256 over the tokens and labels of all samples in their order.

    Args:
        samples: Tokenized, with the columns ``input_ids`` and ``labels``.
    """
    digest = hashlib.sha256()
    for table in samples.select_columns(list(_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        tokens, labels = (table.column(name).combine_chunks() for name in _COLUMNS)
        lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
        for values in (lengths, tokens.flatten().to_numpy(), labels.to_numpy(zero_copy_only=False)):
            # The same bytes whatever integers the columns are stored as.
            dtype = np.float64 if values.dtype.kind == "f" else np.int64
            digest.update(np.ascontiguousarray(values, dtype).tobytes())
    return digest.hexdigest()[:_HEXADECIMAL_DIGITS]


def tokens_digest(samples: Dataset) -> str:
    """sha256 over the tokens, and their types, of all samples in their order."""
    columns = [name for name in ("input_ids", "token_type_ids") if name in samples.column_names]
    digest = hashlib.sha256()
    for rows in samples.select_columns(columns).iter(batch_size=1000):
        for name in columns:
            digest.update(repr([list(row) for row in rows[name]]).encode())
    return digest.hexdigest()
