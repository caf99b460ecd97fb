"""A command's closing figures as people read them: grouped, aligned, and in words.

    training
      loss                0.4123
      seconds             61.5
    evaluation
      accuracy            0.8025

The JSON files that a run writes keep the names of the figures.
"""

from __future__ import annotations

from collections.abc import Mapping

_GROUPS = {
    "train": "training",
    "eval": "evaluation",
    "memory": "memory",
    "cache": "teacher cache",
    "demo": "demo",
}
_NAMES = {
    "runtime": "seconds",
    "total_flos": "floating-point operations",
    "computed": "samples that the teacher ran on",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
    "f1": "F1",
}
_SPLITS = ("validation_matched", "validation_mismatched")


def figures_table(figures: Mapping[str, float]) -> str:
    """Return the figures as lines of text, one a figure, under a heading for each group.

    Args:
        figures: Figure name, such as "eval_accuracy", -> value. A name without a known prefix stands under "run".
    """
    groups: dict[str, dict[str, str]] = {}
    for name, value in figures.items():
        group, rest = _group_of(name)
        groups.setdefault(group, {})[_NAMES.get(rest, rest.replace("_", " "))] = _text(value)
    width = max((len(name) for rows in groups.values() for name in rows), default=0)
    lines = []
    for group, rows in groups.items():
        lines += [group, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
    return "\n".join(lines)


def _group_of(name: str) -> tuple[str, str]:
    prefix, _, rest = name.partition("_")
    if prefix not in _GROUPS or not rest:
        return "run", name
    for split in _SPLITS:
        if rest.startswith(f"{split}_"):
            return f"{_GROUPS[prefix]}, {split.removeprefix('validation_')}", rest.removeprefix(f"{split}_")
    return _GROUPS[prefix], rest


def _text(value: float) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    return f"{int(value):,}" if abs(value) < 1e15 else f"{value:.6g}"
