"""What a model takes as input: which columns of a batch, how many positions, which token ids and token types."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fsd_fast.data import SAMPLE_COLUMN
from fsd_fast.models.loading import read_config, skeleton

_NO_PADDING = -1
_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


def input_arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick what a model's forward takes from a batch: everything but the labels and the samples' places."""
    return {name: value for name, value in inputs.items() if name not in ("labels", SAMPLE_COLUMN)}


@dataclass(frozen=True)
class InputLimits:
    """What fits into a model.

    Attributes:
        positions: Longest input S; None: any.
        vocabulary: Rows of the token embedding.
        token_types: Rows of the token type embedding; None: it takes no token types, 0: it ignores them.
        padding: Padding id the model looks for; -1: it looks but has none configured; None: it uses the mask only.
    """

    positions: int | None
    vocabulary: int
    token_types: int | None
    padding: int | None


def input_limits(config: PreTrainedConfig) -> InputLimits:
    """Read the limits off the model that a configuration describes.

    A table of positions with a padding row (RoBERTa and its kin) counts from the row behind it: P rows and padding row
    p leave P - p - 1 positions.
    """
    model = skeleton(config)
    tables = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    table = next((tables[name] for name in _POSITION_TABLES if name in tables), None)
    positions = getattr(config, "max_position_embeddings", None)
    positions = None if positions is None or positions < 1 else int(positions)
    if table is not None:
        offset = 0 if table.padding_idx is None else table.padding_idx + 1
        positions = table.num_embeddings - offset
    if config.model_type == "big_bird":
        # Beyond it the family attends sparsely, and ``read_config`` makes it attend fully.
        sparse = (5 + 2 * config.num_random_blocks) * config.block_size
        positions = sparse if positions is None else min(positions, sparse)
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    types = tables["token_type_embeddings"].num_embeddings if "token_type_embeddings" in tables else 0
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return InputLimits(
        positions, embedding.num_embeddings, types if takes_types else None, _padding_read(model, table)
    )


def _padding_read(model: PreTrainedModel, table: nn.Embedding | None) -> int | None:
    """The padding id that positions are counted from, or that a head at the last token looks for."""
    if table is not None and table.padding_idx is not None:
        return int(table.padding_idx)
    if not hasattr(model, "score"):
        return None
    return _NO_PADDING if model.config.pad_token_id is None else int(model.config.pad_token_id)


def check_inputs(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, pair: bool
) -> None:
    """Check that a model takes everything that its tokenizer will give it.

    Args:
        name_or_path: The model; only its configuration is read.
        tokenizer: What makes its inputs.
        max_seq_length: Most tokens S of a sample.
        pair: Whether samples are pairs of sentences.

    Raises:
        OSError: There is no such model.
        ValueError: An input would be too long, or an id beyond the rows of an embedding; or the model is refused.
    """
    limits = input_limits(read_config(name_or_path))
    if limits.positions is not None and max_seq_length > limits.positions:
        raise ValueError(
            f"max_seq_length: expected at most the {limits.positions} positions of {name_or_path}, got {max_seq_length}"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= limits.vocabulary:
        raise ValueError(
            f"{name_or_path}: expected token ids below its {limits.vocabulary} embeddings, the tokenizer's go up to "
            f"{largest}"
        )
    types = tokenizer("a", "a" if pair else None).get("token_type_ids")
    if types is not None and limits.token_types is None:
        raise ValueError(
            f"{name_or_path}: the tokenizer makes token_type_ids, which the model does not take; leave them out of "
            "model_input_names in tokenizer_config.json"
        )
    if types is not None and limits.token_types and max(types) >= limits.token_types:
        raise ValueError(
            f"{name_or_path}: expected token types below type_vocab_size {limits.token_types}, the tokenizer's go up "
            f"to {max(types)}"
        )
    if limits.padding is not None and limits.padding != tokenizer.pad_token_id:
        raise ValueError(
            f"{name_or_path}: expected pad_token_id {tokenizer.pad_token_id} in config.json as in the tokenizer, got "
            f"{None if limits.padding == _NO_PADDING else limits.padding}"
        )
