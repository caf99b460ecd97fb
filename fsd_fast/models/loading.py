"""From a folder or the Hub to a model: nothing is built from a damaged configuration, and no weight is made up.

transformers starts every weight afresh that it does not find, with a warning. Here that is an error, except for the
head of a model that is about to be trained. Code that comes with a model is never run.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fsd_fast.models.families import check_family, check_shapes, layer_stack
from fsd_fast.models.whole_weights import whole_weights

LARGEST_COUNT = 1_000
LARGEST_SIZE = 100_000_000
_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"),
    *("num_decoder_layers", "num_feedforward_networks", "num_hidden_groups", "inner_group_num"),
)
"""Settings that say how many modules are built; the others say how large they are."""
_VOCABULARY_FILES = (
    *(
        "tokenizer.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
    ),
    *("spm.model", "bpe.codes"),
)


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing its table of missing weights: each of them is checked here."""
    library = logging.getLogger("transformers.modeling_utils")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def _check_settings(settings: dict[str, Any], name: str) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            _check_settings(value, name)
        least, most = (1, LARGEST_COUNT) if key in _COUNTS else (None, LARGEST_SIZE)
        if key in _COUNTS and type(value) is not int:
            raise ValueError(f"{name}: config.json: {key}: expected a whole number, got {value!r}")
        if isinstance(value, int) and not (value <= most and (least is None or value >= least)):
            expected = f"at most {most:,}" if least is None else f"{least} to {most:,}"
            raise ValueError(f"{name}: config.json: {key}: expected {expected}, got {value:,}")


def read_config(name_or_path: str) -> PreTrainedConfig:
    """Read a model's configuration after checking its numbers.

    Absurd sizes would make building the model take for ever.

    Raises:
        OSError: There is no such model, or its config.json is no JSON.
        ValueError: A number is out of range, or the family is one that fsd_fast does not take.
    """
    settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
    if not settings:
        raise OSError(f"{name_or_path}: expected a saved model with a config.json, found none")
    _check_settings(settings, name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    check_family(config, name_or_path)
    if config.model_type == "big_bird":
        # What the library itself switches to, in the middle of a run, where an input is short.
        config.attention_type = "original_full"
    return config


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it pads on the right, where padding moves no token.

    Raises:
        OSError: There is no such model, or its folder lacks a file of the tokenizer.
        ValueError: The model is refused by ``read_config``, or its tokenizer has no padding token.
    """
    read_config(name_or_path)
    folder = Path(name_or_path)
    local = folder.is_dir()
    if local and not any((folder / file).is_file() for file in _VOCABULARY_FILES):
        raise OSError(
            f"{name_or_path}: no tokenizer; expected tokenizer.json or the vocabulary file of the family, one of "
            f"{', '.join(_VOCABULARY_FILES[1:])}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, padding_side="right")
    except Exception as error:  # of many kinds, and few of them name the file
        raise ValueError(f"{name_or_path}: its tokenizer cannot be loaded: {error}") from error
    if local and not (folder / "tokenizer.json").is_file():
        files = {file for key, file in tokenizer.vocab_files_names.items() if key != "tokenizer_file"}
        missing = sorted(file for file in files if not (folder / file).is_file())
        if missing:
            raise OSError(f"{name_or_path}: the tokenizer lacks {', '.join(missing)} (or one tokenizer.json)")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{name_or_path}: its tokenizer has no padding token; expected one, also as pad_token_id in config.json"
        )
    return tokenizer


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the classifier of a configuration without memory for its weights, on torch's meta device."""
    with whole_weights(), torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model's weights.

    Raises:
        OSError: There are none, or one that the index names is missing.
        ValueError: The index is damaged.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: damaged; expected JSON with a weight_map") from None
        files = [folder / name for name in sorted(names)]
        for file in files:
            if not file.is_file():
                raise OSError(f"{file}: not found; {index.name} names it")
        return files
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name != "training_args.bin")
    if pickles:
        raise OSError(
            f"{folder}: expected {SAFE_WEIGHTS_NAME}, found the pickle {pickles[0]}, which is not read because "
            "loading it may run code; where you trust it, convert it: load it with transformers' from_pretrained and "
            "save it with save_pretrained"
        )
    raise OSError(f"{folder}: expected weights in {SAFE_WEIGHTS_NAME}, found none")


def _stored_numbers(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - no mapping
                    total += torch.Size(stored.get_slice(key).get_shape()).numel()
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file: {error}") from None
    return total


def _check_size(config: PreTrainedConfig, folder: Path) -> None:
    """Compare the number of weights with what is stored, before memory is taken for them."""
    described = sum(parameter.numel() for parameter in skeleton(config).parameters())
    stored = _stored_numbers(weight_files(folder))
    # A head and a pooler may be missing: a few D x D matrices.
    if described > 2 * stored + 10_000_000:
        raise ValueError(
            f"{folder}: config.json describes a model of {described:,} weights, its files hold {stored:,}"
        )


def load_weights(
    name_or_path: str, config: PreTrainedConfig, *, fresh_head: bool
) -> tuple[PreTrainedModel, bool]:
    """Load a sequence classifier in float32, whatever precision it was saved in.

    Args:
        name_or_path: A folder or a Hub name.
        config: What to build; ``read_config``'s, perhaps changed.
        fresh_head: Whether a head (and a pooler) that is not there, or has other shapes, is started afresh.

    Returns:
        The model, and whether its whole head came from the files.

    Raises:
        OSError: There is no such model, or none in safetensors files.
        ValueError: Weights are missing, have other shapes than the configuration says, or are more than it says.
    """
    if Path(name_or_path).is_dir():
        _check_size(config, Path(name_or_path))
    with _without_load_report():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    encoder = {key for key in absent if key.startswith(f"{model.base_model_prefix}.")}
    head = absent - encoder
    if fresh_head:
        encoder = {key for key in encoder if ".pooler." not in key}
    if not fresh_head and head and not encoder:
        raise ValueError(
            f"{name_or_path}: no fine-tuned head ({_some(head)} missing or of another shape); make one with\n"
            f"    fsd-fast teacher --task_name X --model_name_or_path {name_or_path} --output_dir ..."
        )
    if encoder:
        raise ValueError(
            f"{name_or_path}: weights do not fit config.json (model_type {config.model_type!r}): "
            f"{_some(encoder)} missing or of another shape"
        )
    stack = layer_stack(model)
    base = f"{model.base_model_prefix}."
    surplus = {
        key
        for key in report["unexpected_keys"]
        if stack and key.removeprefix(base).startswith(f"{stack[0].removeprefix(base)}.")
    }
    if surplus:
        raise ValueError(
            f"{name_or_path}: more weights than config.json describes: {_some(surplus)} "
            f"belong to none of its {config.num_hidden_layers} layers"
        )
    check_shapes(model, name_or_path)
    return model, not head


def _some(keys: set[str]) -> str:
    listed = sorted(keys)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
