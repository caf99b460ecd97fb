"""The table of model families in docs/families.md: ``python -m tools.families`` writes it anew.

Each family is tried on a model of random weights, 2 layers deep and 32 wide: loaded as a teacher with its classes in
another order, read for a memory, cut to one layer, exported and loaded again. What is refused is refused by fsd_fast
itself, in the words of its error.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fsd_fast.models.families import STOPS_EARLY
from fsd_fast.models.inputs import check_inputs
from fsd_fast.models.loading import load_tokenizer
from fsd_fast.models.student import load_classifier
from fsd_fast.models.teacher import Teacher
from fsd_fast.training.export import check_export

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
LABELS = ("entailment", "neutral", "contradiction")
LAYERS = 2
WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *"one two three four five six seven eight good bad the a is was".split(),
]

_SIZES = {"vocab_size": 32, "pad_token_id": 1}
_BERT = {
    **_SIZES,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
_SMALL_EMBEDDING = {**_BERT, "embedding_size": 16}
_RELATIVE = {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_BOTTLENECK = {"true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": LAYERS + 1}
_UNGROUPED = (
    "q_groups",
    "k_groups",
    "v_groups",
    "post_attention_groups",
    "intermediate_groups",
    "output_groups",
)
_SEQ2SEQ = {**_SIZES, "d_model": 32, "decoder_start_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ALBERT": ("albert", _SMALL_EMBEDDING),
    "BART": ("bart", {**_SEQ2SEQ, "encoder_layers": LAYERS, "decoder_layers": LAYERS}),
    "BERT": ("bert", _BERT),
    "BigBird": ("big_bird", _BERT),
    "CamemBERT": ("camembert", _BERT),
    "DeBERTa": ("deberta", {**_RELATIVE, "type_vocab_size": 0}),
    "DeBERTa-v2, -v3": ("deberta-v2", {**_RELATIVE, "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm"}),
    "DistilBERT": (
        "distilbert",
        {
            **_SIZES,
            "dim": 32,
            "n_layers": LAYERS,
            "n_heads": 2,
            "hidden_dim": 64,
            "max_position_embeddings": 40,
        },
    ),
    "ELECTRA": ("electra", _SMALL_EMBEDDING),
    "Funnel": (
        "funnel",
        {**_SIZES, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
    ),
    "GPT-2": ("gpt2", {**_SIZES, "n_embd": 32, "n_layer": LAYERS, "n_head": 2, "n_positions": 40}),
    "Llama": ("llama", {**_BERT, "num_key_value_heads": 1}),
    "Longformer": ("longformer", {**_BERT, "attention_window": [4] * LAYERS}),
    "MobileBERT": ("mobilebert", {**_SMALL_EMBEDDING, **_BOTTLENECK}),
    "ModernBERT": ("modernbert", {**_BERT, "global_attn_every_n_layers": 2, "local_attention": 4}),
    "MPNet": ("mpnet", _BERT),
    "Nystromformer": ("nystromformer", _BERT),
    "Qwen3": ("qwen3", {**_BERT, "num_key_value_heads": 1, "head_dim": 16}),
    "RoBERTa": ("roberta", _BERT),
    "RoFormer": ("roformer", _BERT),
    "SqueezeBERT": ("squeezebert", {**_BERT, "embedding_size": 32, **dict.fromkeys(_UNGROUPED, 1)}),
    "T5": ("t5", {**_SEQ2SEQ, "num_layers": LAYERS, "num_heads": 2, "d_ff": 64, "d_kv": 16}),
    "XLM-RoBERTa": ("xlm-roberta", _BERT),
    "XLNet": ("xlnet", {**_SIZES, "d_model": 32, "n_layer": LAYERS, "n_head": 2, "d_inner": 64}),
}
"""Name -> (model_type, settings of its tiny model)."""


def save_tiny(name: str, folder: Path, *, labels: tuple[str, ...] = LABELS, **settings: Any) -> Path:
    """Save a family's tiny classifier of random weights with a tokenizer of a few words; ``settings`` change it."""
    model_type, sizes = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**sizes, "num_labels": len(labels), **settings})
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


def batch(folder: Path) -> dict[str, torch.Tensor]:
    """Two samples ``[2, S]`` of different lengths, padded."""
    return dict(
        load_tokenizer(str(folder))(
            ["one good two", "the one was a bad three is"], padding=True, return_tensors="pt"
        )
    )


@dataclass
class Row:
    """What became of a family."""

    name: str
    refusal: str | None = None
    skips_last: bool = False


def examine(name: str, folder: Path) -> Row:
    """Send a family's tiny model through everything that the commands do with one.

    Raises:
        AssertionError: Something that was not refused gave wrong numbers.
    """
    saved = save_tiny(name, folder, labels=("CONTRADICTION", "Entailment", "neutral"))
    try:
        tokenizer = load_tokenizer(str(saved))
        check_inputs(str(saved), tokenizer, 32, pair=True)
        teacher = Teacher.from_pretrained(str(saved))
    except ValueError as error:
        return Row(name, refusal=str(error).partition(" is not supported: ")[2] or str(error))
    inputs = batch(saved)
    unordered, _ = teacher.hidden_states(inputs)
    teacher.follow_labels(LABELS)
    logits, hidden = teacher.hidden_states(inputs)
    assert torch.allclose(logits, unordered[:, [1, 2, 0]], atol=1e-5), f"{name}: labels"
    assert torch.equal(teacher.penultimate(inputs), hidden[LAYERS - 1]), f"{name}: penultimate"
    student = load_classifier(str(saved), LABELS, 1)
    small, states = Teacher(student, name).hidden_states(inputs)
    assert small.shape == logits.shape, f"{name}: logits of the student"
    assert len(states) == 2, f"{name}: layers of the student"
    assert torch.allclose(states[0], hidden[0], atol=1e-5), f"{name}: embeddings of the student"
    check_export(student, tokenizer)
    return Row(name, skips_last=FAMILIES[name][0] in STOPS_EARLY)


def line(row: Row) -> str:
    """A family's line of the table."""
    cells = ["works", "works", "works" if row.skips_last else "works, runs the last layer too", "works"]
    if row.refusal:
        cells = [f"refused: {row.refusal}", "refused", "refused", "refused"]
    return f"| {row.name} | {FAMILIES[row.name][0]} | {' | '.join(cells)} |"


def page(table: list[str]) -> str:
    """Return docs/families.md around the lines of its table."""
    return "\n".join([*_BEFORE, *table, *_AFTER, ""])


_BEFORE = """# Model families

A family is what `model_type` in a model's config.json says. Each was tried on a tiny model of random weights: loaded
as a teacher with its classes in another order, read for a memory, cut to fewer layers, exported and loaded again. Every
model, its family listed or not, is tried on a few tokens when it is loaded, and refused unless it gives a hidden state
`[B, S, D]` for the embeddings and for each layer.

| family | `model_type` | teacher | student with fewer layers | memory | export |
|---|---|---|---|---|---|""".splitlines()

_AFTER = """
GPT-2, Llama and Qwen3 read the last token that is not padding: their tokenizer needs a padding token, and config.json
the same `pad_token_id`. Padding is always on the right. BigBird attends fully, as transformers lets it do for short
inputs, and takes no longer ones.

The table is written by `python -m tools.families`; a test compares it with what the models do.""".splitlines()


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [examine(name, Path(scratch) / str(number)) for number, name in enumerate(FAMILIES)]
    PAGE.write_text(page([line(row) for row in rows]), encoding="utf-8")
    sys.stdout.write(f"written: {PAGE}\n")


if __name__ == "__main__":
    main()
