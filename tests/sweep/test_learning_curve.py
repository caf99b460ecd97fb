"""The picture of learning curves, from the rows of a sweep."""

import dataclasses

from tests.sweep.test_tables import row
from tools.learning_curve import curve, draw


def sized(size, score, seed=0, **changes):
    return dataclasses.replace(row(seed=seed, score=score), train_samples=size, **changes)


def test_a_curve_has_means_and_standard_errors_by_size():
    rows = [sized(300, 0.5), sized(100, 0.4), sized(300, 0.7, seed=1), sized(1000, 0.9, agreement=None)]
    points = curve(rows, lambda each: each.score)
    assert [size for size, _, _ in points] == [100, 300, 1000]
    assert [mean for _, mean, _ in points] == [0.4, 0.6, 0.9]
    # Deviation of 0.5 and 0.7 is 0.1 sqrt 2; over two seeds the error of their mean is 0.1. One seed has none.
    assert [round(error, 12) for _, _, error in points] == [0, 0.1, 0]
    assert [size for size, _, _ in curve(rows, lambda each: each.agreement)] == [100, 300]


def test_the_picture_is_drawn(tmp_path):
    rows = [sized(size, 0.5, method=method) for size in (100, 300) for method in ("vkd", "teacher")]
    draw([*rows, dataclasses.replace(rows[0], task="sst2")], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
