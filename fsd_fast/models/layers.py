"""Which teacher layer each student layer is compared with.

Layers are indices into ``hidden_states``: 0 is the embeddings' output, k the output of layer k. A pair is
(teacher layer, student layer).
"""

from __future__ import annotations

LayerPair = tuple[int, int]


def penultimate_pair(teacher_layers: int, student_layers: int) -> LayerPair:
    """The paper's pair: the last layer but one on both sides, (11, 5) for 12 and 6 layers."""
    return teacher_layers - 1, student_layers - 1


def parse_layer_pairs(text: str, teacher_layers: int, student_layers: int) -> list[LayerPair]:
    """Turn ``--layer_pairs`` into pairs of hidden-state indices.

    Args:
        text: "penultimate"; "layerwise", which spreads the student's inner layers evenly over the teacher's
            ((2, 1), (4, 2), ... (10, 5) for 12 and 6 layers); or a list "T:S,T:S,...", e.g. "11:5,9:4".
        teacher_layers: Number of layers of the teacher.
        student_layers: Number of layers of the student.

    Returns:
        One or more (teacher layer, student layer).

    Raises:
        ValueError: The text is none of the three forms, names a layer that does not exist, or the student is
            deeper than the teacher.
    """
    if student_layers > teacher_layers:
        raise ValueError(
            f"student_layers: expected at most the teacher's {teacher_layers} layers, got {student_layers}"
        )
    if text == "penultimate":
        return [penultimate_pair(teacher_layers, student_layers)]
    if text == "layerwise":
        if student_layers < 2:
            raise ValueError("layer_pairs: 'layerwise' needs a student with at least 2 layers")
        return [(round(i * teacher_layers / student_layers), i) for i in range(1, student_layers)]
    pairs = []
    for entry in text.split(","):
        try:
            teacher, student = (int(number) for number in entry.split(":"))
        except ValueError:
            raise ValueError(
                f"layer_pairs: expected 'penultimate', 'layerwise' or a list such as '11:5,9:4', got {text!r}"
            ) from None
        if not (0 <= teacher <= teacher_layers and 0 <= student <= student_layers):
            raise ValueError(
                f"layer_pairs: {entry.strip()!r} names a layer that does not exist; the teacher has hidden states "
                f"0 to {teacher_layers}, the student 0 to {student_layers}"
            )
        pairs.append((teacher, student))
    return pairs


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Turn ``--layers`` into indices of hidden states, ascending.

    Args:
        text: "penultimate"; "all"; or a list such as "0,3,5".
        num_layers: Layers of the model.

    Raises:
        ValueError: The text is none of the three forms, or names a layer that does not exist.
    """
    if text == "penultimate":
        return (num_layers - 1,)
    if text == "all":
        return tuple(range(num_layers + 1))
    try:
        layers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ValueError(
            f"layers: expected 'penultimate', 'all' or a list such as '0,3,5', got {text!r}"
        ) from None
    if not 0 <= layers[0] <= layers[-1] <= num_layers:
        raise ValueError(f"layers: expected hidden states 0 to {num_layers}, got {text!r}")
    return tuple(layers)
