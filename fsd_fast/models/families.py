"""Model families: which ones fsd_fast takes, how their layers are found, and how a model loses its last layers.

A family is a ``model_type`` of transformers. Needed are hidden states ``[B, S, D]``, one for the embeddings and one for
each of the L layers, and a classifier that keeps its meaning when the last layers are left out. Families known not to
give that are refused by name. Every other model, its family listed in docs/families.md or not, is tried on a few
tokens when it is loaded (``check_shapes``).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

REFUSED = {
    "funnel": "it shortens the sequence between its blocks, so its hidden states differ in length",
    "nystromformer": "its attention takes inputs of one fixed length only",
    "xlnet": "its head reads the last position, so it needs padding on the left, which moves the tokens of a sample",
}
"""Family -> why it can be neither teacher nor student."""

STOPS_EARLY = frozenset(
    "bert big_bird camembert deberta deberta-v2 distilbert electra gpt2 llama mobilebert modernbert mpnet qwen3 "
    "roberta roformer xlm-roberta".split()
)
"""Families whose last layer takes the last hidden state but one as it is, tested bit for bit.

Elsewhere that input may have other axes (SqueezeBERT: ``[B, D, S]``), more positions (Longformer pads to its window),
or no layer of its own (ALBERT calls one layer again and again).
"""

_SHARED_LAYERS = ("albert",)
_NOT_PER_LAYER = ("architectures", "pos_att_type")
"""Lists of a configuration that may happen to be as long as the model is deep."""


def check_family(config: PreTrainedConfig, name: str) -> None:
    """Check that a model is of a family that fsd_fast takes.

    Args:
        config: Its configuration.
        name: Its name or path, for the message.

    Raises:
        ValueError: It is not; the message says why.
    """
    family = config.model_type
    reason = REFUSED.get(family)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder; expected one stack of layers"
    elif family not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        reason = "transformers has no sequence classifier of it"
    if reason is not None:
        raise ValueError(f"{name}: model family {family!r} is not supported: {reason}")


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Find the model's layers and their name: the outermost module list as long as the configuration says.

    Returns:
        None where there is no such list, or layers share their weights (ALBERT).

    Raises:
        ValueError: Several lists qualify.
    """
    if model.config.model_type in _SHARED_LAYERS:
        return None
    depth = model.config.num_hidden_layers
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inner:
            found.append((name, module))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"model: expected one stack of {depth} layers in {type(model).__name__}, found {names}"
        )
    return found[0] if found else None


def sample_inputs(config: PreTrainedConfig, length: int) -> dict[str, Tensor]:
    """Token ids ``[1, length]`` that the model takes, none of them padding, and their mask."""
    vocabulary, padding = int(config.vocab_size), getattr(config, "pad_token_id", None)
    ids = [i for i in range(min(vocabulary, length + 1)) if i != padding] or [0]
    ids = (ids * length)[:length]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, length, dtype=torch.long)}


def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits ``[B, C]`` and hidden states of a model in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
    finally:
        model.train(training)
    hidden = getattr(output, "hidden_states", None)
    return output.logits, () if hidden is None else tuple(hidden)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results of one computation agree; where their weights lie in memory may change the last bits."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def check_shapes(model: PreTrainedModel, name: str, length: int = 4) -> None:
    """Run a model on a few tokens and check the shapes of what comes out.

    transformers hangs its hooks for hidden states into a model at its first call that asks for them, which
    ``torch.compile`` cannot trace: it would cut the graph there. After this call they are in place.

    Args:
        model: Any sequence classifier, on the CPU.
        name: Its name or path, for messages.
        length: Tokens S.

    Raises:
        ValueError: Its hidden states are not L + 1 tensors ``[1, S, D]`` or its logits are not ``[1, C]``.
    """
    config = model.config
    logits, hidden = outputs_of(model, sample_inputs(config, length))
    expected = [[1, length, config.hidden_size]] * (config.num_hidden_layers + 1)
    found = [list(state.shape) for state in hidden]
    if found != expected or list(logits.shape) != [1, config.num_labels]:
        raise ValueError(
            f"{name}: model family {config.model_type!r} is not supported: expected {len(expected)} hidden states "
            f"{expected[0]} and logits {[1, config.num_labels]}, got {len(found)} hidden states "
            f"{sorted(map(list, {tuple(shape) for shape in found}))} and logits {list(logits.shape)}"
        )


def with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Copy a configuration for its first layers: their number, and every list with an entry for each layer."""
    depth = config.num_hidden_layers
    small = copy.deepcopy(config)
    for name, value in vars(config).items():
        per_layer = isinstance(value, list | tuple) and len(value) == depth
        if per_layer and name not in _NOT_PER_LAYER and not name.endswith(("_id", "_ids")):
            setattr(small, name, value[:num_layers])
    small.num_hidden_layers = num_layers
    return small


def first_layers(model: PreTrainedModel, num_layers: int, name: str) -> PreTrainedModel:
    """Build the model of a deeper one's embeddings, first layers and head, and check that it computes the same.

    Args:
        model: The deeper model, L layers.
        num_layers: Layers to keep, counted from the embeddings: 1 to L - 1.
        name: The model's name or path, for the message.

    Raises:
        ValueError: A layer of this family depends on how many there are: the hidden states are not those of the
            deeper model.
    """
    small = type(model)(with_layers(model.config, num_layers))
    stack = layer_stack(model)
    prefix = None if stack is None else f"{stack[0]}."
    kept = {
        key: value
        for key, value in model.state_dict().items()
        if prefix is None or not key.startswith(prefix) or int(key[len(prefix) :].split(".")[0]) < num_layers
    }
    small.load_state_dict(kept)
    if not _computes_the_same(model, small):
        raise ValueError(
            f"{name}: model family {model.config.model_type!r} cannot be cut to {num_layers} of "
            f"{model.config.num_hidden_layers} layers: its first layers then compute something else"
        )
    return small


def _computes_the_same(deep: PreTrainedModel, shallow: PreTrainedModel) -> bool:
    """Whether the hidden states of a model are those of a deeper one."""
    depth, inputs = shallow.config.num_hidden_layers, sample_inputs(deep.config, 4)
    last: list[Tensor] = []
    stack = layer_stack(shallow)
    handle = None
    if stack is not None:
        handle = stack[1][-1].register_forward_hook(
            lambda _, arguments, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    expected, found = outputs_of(deep, inputs)[1], outputs_of(shallow, inputs)[1]
    if handle is not None:
        handle.remove()
    # Some families normalize what their last layer gives, and only there (GPT-2, Llama, ModernBERT).
    ends_alike = any(same(state, expected[depth]) for state in (found[depth], *last))
    return ends_alike and all(same(found[layer], expected[layer]) for layer in range(depth))
