"""Layer pairs: the paper's choices and the errors of ``--layer_pairs``."""

from __future__ import annotations

import pytest

from fsd_fast.models.layers import parse_layer_pairs, penultimate_pair


@pytest.mark.parametrize(
    ("teacher", "student", "pair"), [(12, 6, (11, 5)), (6, 3, (5, 2)), (24, 24, (23, 23)), (12, 1, (11, 0))]
)
def test_penultimate_pair(teacher: int, student: int, pair: tuple[int, int]) -> None:
    assert penultimate_pair(teacher, student) == pair
    assert parse_layer_pairs("penultimate", teacher, student) == [pair]


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        (12, 6, [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]),
        (6, 3, [(2, 1), (4, 2)]),
        (4, 4, [(1, 1), (2, 2), (3, 3)]),
        (12, 4, [(3, 1), (6, 2), (9, 3)]),
    ],
)
def test_layerwise(teacher: int, student: int, pairs: list[tuple[int, int]]) -> None:
    assert parse_layer_pairs("layerwise", teacher, student) == pairs


@pytest.mark.parametrize("teacher", range(2, 25))
def test_layerwise_uses_inner_layers_once_and_in_order(teacher: int) -> None:
    for student in range(2, teacher + 1):
        teachers, students = zip(*parse_layer_pairs("layerwise", teacher, student), strict=True)
        assert students == tuple(range(1, student))
        assert list(teachers) == sorted(set(teachers))
        assert 0 < teachers[0]
        assert teachers[-1] < teacher


@pytest.mark.parametrize(
    ("text", "pairs"),
    [("11:5", [(11, 5)]), ("11:5,9:4", [(11, 5), (9, 4)]), (" 12:6 , 0:0 ", [(12, 6), (0, 0)])],
)
def test_lists(text: str, pairs: list[tuple[int, int]]) -> None:
    assert parse_layer_pairs(text, 12, 6) == pairs


@pytest.mark.parametrize("text", ["", "last", "11", "11:5:3", "11:5,", "a:b", "11-5", "11:5;9:4"])
def test_other_text_is_refused_with_the_three_forms(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"layer_pairs: expected 'penultimate', 'layerwise' or a list"
    ) as error:
        parse_layer_pairs(text, 12, 6)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "culprit"), [("11:5,13:6", "13:6"), ("12:7", "12:7"), ("-1:5", "-1:5")])
def test_layers_that_do_not_exist_are_named(text: str, culprit: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{culprit}' names a layer .* teacher .*0 to 12, the student 0 to 6"
    ):
        parse_layer_pairs(text, 12, 6)


@pytest.mark.parametrize("text", ["penultimate", "layerwise", "1:1"])
def test_a_student_deeper_than_its_teacher_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"student_layers: expected at most the teacher's 6 layers, got 7"):
        parse_layer_pairs(text, 6, 7)


def test_layerwise_needs_an_inner_layer() -> None:
    with pytest.raises(ValueError, match=r"layer_pairs: 'layerwise' needs .* at least 2 layers"):
        parse_layer_pairs("layerwise", 12, 1)
