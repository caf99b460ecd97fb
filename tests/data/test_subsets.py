"""Seeded subsets of a training set, and the rows that are held out of it."""

import pytest
from datasets import DatasetDict

from fsd_fast.data import choose_rows, get_task
from fsd_fast.data.glue import to_dataset
from fsd_fast.data.subsets import row_order

TASK = get_task("sst2")


def splits(train=50):
    return DatasetDict(
        {
            name: to_dataset(
                TASK, {"sentence": [f"{name} {i}" for i in range(size)]}, [i % 2 for i in range(size)]
            )
            for name, size in (("train", train), ("validation", 5))
        }
    )


def chosen(maximum, seed, heldout):
    task, found = choose_rows(TASK, splits(), maximum, seed, heldout)
    return task, {name: list(rows["idx"]) for name, rows in found.items()}


def test_nothing_changes_unless_asked_for():
    task, found = chosen(None, 3, 0)
    assert task == TASK
    assert found == {"train": list(range(50)), "validation": list(range(5))}


def test_the_order_is_fixed_for_ever():
    assert row_order(10, 1) == [7, 4, 8, 6, 5, 2, 3, 0, 9, 1]
    assert row_order(4, None) == [0, 1, 2, 3]
    assert row_order(50, 0) != row_order(50, 1)
    assert sorted(row_order(50, 0)) == list(range(50))


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_subsets_are_nested_and_share_their_heldout_rows(seed):
    by_size = {size: chosen(size, seed, 10)[1] for size in (5, 20, 40)}
    assert by_size[5]["train"] == by_size[20]["train"][:5]
    assert by_size[20]["train"] == by_size[40]["train"][:20]
    for found in by_size.values():
        assert found["heldout"] == by_size[5]["heldout"]
        assert not set(found["heldout"]) & set(found["train"])
    assert len(by_size[5]["heldout"]) == 10
    # Together they are the whole training set, however large a subset is asked for.
    everything = chosen(1000, seed, 10)[1]
    assert sorted(everything["train"] + everything["heldout"]) == list(range(50))


def test_heldout_rows_come_first_and_dev_stays():
    task, found = chosen(None, 0, 10)
    assert task.eval_splits == ("heldout", "validation")
    assert found["validation"] == list(range(5))
    assert len(found["train"]) == 40


def test_rows_must_be_left_to_train_on():
    with pytest.raises(
        ValueError, match="heldout_samples: expected fewer than the 50 training rows of 'sst2', got 50"
    ):
        choose_rows(TASK, splits(), None, 0, 50)
