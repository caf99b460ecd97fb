"""MiniBatchKMeans, the sketch, k-means++ and clustering in two passes, on one process and on several."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from fsd_fast.clustering.mini_batch_kmeans import MiniBatchKMeans
from fsd_fast.clustering.seeding import k_means_plus_plus
from fsd_fast.clustering.sketch import CountSketch
from fsd_fast.clustering.stream_kmeans import StreamKMeans
from fsd_fast.clustering.two_pass import cluster_stream
from fsd_fast.distributed import Collectives

ROOT = Path(__file__).resolve().parents[2]


def text_like(rows: int, features: int, seed: int = 0) -> Tensor:
    """Overlapping clusters in features of which every 97th has a mean 40 times its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 30, generator=generator) @ torch.randn(30, features, generator=generator)
    points = 0.4 * latent + torch.randn(rows, features, generator=generator)
    points[:, ::97] += 80
    return points


def inertia_of(points: Tensor, centroids: Tensor, labels: Tensor) -> float:
    return float((points.double() - centroids.double()[labels]).square().sum())


@pytest.fixture(scope="module")
def points() -> Tensor:
    return text_like(500, 3000)


@pytest.fixture(scope="module")
def sklearn_inertia(points: Tensor) -> float:
    runs = [KMeans(20, n_init=1, random_state=seed, tol=0).fit(points.numpy()) for seed in range(3)]
    return float(np.mean([run.inertia_ for run in runs]))


# --- the parts ------------------------------------------------------------------------------------------------


def test_sketch_keeps_squared_distances(points: Tensor) -> None:
    true = torch.cdist(points[:100], points[100:200]).square()
    errors = []
    for seed in range(5):
        sketched = CountSketch(3000, 512, seed)(points[:200])
        assert sketched.shape == (200, 512)
        errors.append((torch.cdist(sketched[:100], sketched[100:]).square() / true - 1).flatten())
    error = torch.cat(errors)
    assert error.mean().abs() < 0.03  # unbiased
    assert error.std() < 1.2 * (2 / 512) ** 0.5


def test_sketch_of_features_that_repeat_with_the_width() -> None:
    """An outlier dimension of BERT recurs at every position: its energy must not fall into one bucket."""
    difference = torch.zeros(1, 64 * 256)
    difference[0, 7::256] = 1.0
    squares = (
        torch.stack([CountSketch(64 * 256, 256, seed)(difference).square().sum() for seed in range(200)]) / 64
    )
    assert abs(float(squares.mean()) - 1) < 0.05
    assert float(squares.std()) < 0.2  # in one bucket it would be 1.4


def test_sketch_is_linear_seeded_and_blind_to_batches(points: Tensor) -> None:
    sketch = CountSketch(3000, 700, seed=3)
    whole = sketch(points[:40])
    assert torch.equal(torch.cat([sketch(points[:7]), sketch(points[7:40])]), whole)
    assert torch.equal(CountSketch(3000, 700, seed=3)(points[:40]), whole)
    assert not torch.equal(CountSketch(3000, 700, seed=4)(points[:40]), whole)
    cut = points[:40].clone()
    cut[:, 1234:] = 0
    assert torch.equal(sketch(points[:40, :1234]), sketch(cut))
    torch.testing.assert_close(sketch(2 * points[:40]), 2 * whole)


def test_sketch_of_narrow_points_is_the_points() -> None:
    points = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CountSketch(12, 12, 0)(points), torch.nn.functional.pad(points, (0, 2)))


def test_k_means_plus_plus_takes_one_point_of_each_far_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(8, 16, generator=generator)
    owner = torch.arange(8).repeat(20)
    points = centers[owner] + torch.randn(160, 16, generator=generator)
    points -= points.mean(0)
    for seed in range(10):
        chosen = k_means_plus_plus(points, 8, torch.Generator().manual_seed(seed))
        assert sorted(owner[chosen].tolist()) == list(range(8))


def test_k_means_plus_plus_of_duplicates_takes_each_value_once() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 300, generator=generator)
    points = values.repeat(30, 1)
    points -= points.mean(0)
    chosen = k_means_plus_plus(points, 7, generator)
    assert sorted((chosen[:5] % 5).tolist()) == [0, 1, 2, 3, 4]
    assert chosen.unique().numel() == 7


# --- MiniBatchKMeans --------------------------------------------------------------------------------------------


def test_fit_reaches_sklearns_inertia(points: Tensor, sklearn_inertia: float) -> None:
    runs = [MiniBatchKMeans(20, random_state=seed).fit(points) for seed in range(3)]
    assert np.mean([run.inertia_ for run in runs]) <= 1.01 * sklearn_inertia


def test_what_fit_leaves_belongs_together(points: Tensor) -> None:
    kmeans = MiniBatchKMeans(20, random_state=1, batch_size=64).fit(points)
    assert kmeans.cluster_centers_.dtype == torch.float32
    assert torch.equal(kmeans.predict(points), kmeans.labels_)
    assert torch.equal(kmeans.labels_.bincount(minlength=20), kmeans.counts_)
    expected = inertia_of(points, kmeans.cluster_centers_, kmeans.labels_)
    assert kmeans.inertia_ == pytest.approx(expected, rel=1e-6)
    distances = kmeans.transform(points)
    assert torch.equal(distances.argmin(1), kmeans.labels_)
    assert float(distances.amin(1).double().square().sum()) == pytest.approx(expected, rel=1e-5)
    assert kmeans.n_iter_ == len(kmeans.epoch_stats_)
    inertias = [epoch.inertia for epoch in kmeans.epoch_stats_]
    assert inertias == sorted(inertias, reverse=True)
    # It stopped because nothing moves any more, not because it was told to.
    assert kmeans.n_iter_ < kmeans.max_iter
    assert kmeans.epoch_stats_[-1].shift == 0
    for cluster in range(20):
        mean = points[kmeans.labels_ == cluster].double().mean(0)
        torch.testing.assert_close(kmeans.cluster_centers_[cluster].double(), mean, rtol=1e-6, atol=1e-6)


def test_interrupted_epochs_still_leave_labels_of_the_final_centroids(points: Tensor) -> None:
    kmeans = MiniBatchKMeans(20, random_state=1, max_iter=2).fit(points)
    assert kmeans.n_iter_ == 2
    assert torch.equal(kmeans.predict(points), kmeans.labels_)
    assert kmeans.inertia_ < kmeans.epoch_stats_[-1].inertia
    loose = MiniBatchKMeans(20, random_state=1, tol=0.05).fit(points)
    assert 2 <= loose.n_iter_ < MiniBatchKMeans(20, random_state=1).fit(points).n_iter_


def test_every_kind_of_source_gives_the_same(points: Tensor) -> None:
    cuts = [points[:100], points[100:101], points[101:101], points[101:]]

    def stream() -> Iterator[Tensor]:
        yield from cuts

    whole = MiniBatchKMeans(10, random_state=2).fit(points)
    for source in (cuts, stream, torch.utils.data.DataLoader(points, batch_size=64)):  # type: ignore[arg-type]
        other = MiniBatchKMeans(10, random_state=2).fit(source)
        assert torch.equal(other.labels_, whole.labels_)
        torch.testing.assert_close(other.cluster_centers_, whole.cluster_centers_)


def test_same_bits_for_one_seed_and_no_global_seed(points: Tensor) -> None:
    before = torch.random.get_rng_state()
    first = MiniBatchKMeans(10, random_state=5, max_iter=3).fit(points)
    second = MiniBatchKMeans(10, random_state=5, max_iter=3).fit(points)
    assert torch.equal(first.cluster_centers_, second.cluster_centers_)
    assert not torch.equal(
        first.cluster_centers_, MiniBatchKMeans(10, random_state=6, max_iter=3).fit(points).cluster_centers_
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numbers_decide_and_not_the_order_of_the_stream(points: Tensor) -> None:
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    plain = MiniBatchKMeans(10, random_state=2).fit([(points, torch.arange(500))])
    shuffled = MiniBatchKMeans(10, random_state=2).fit([(points[shuffle], shuffle)])
    assert torch.equal(shuffled.labels_, plain.labels_[shuffle])
    torch.testing.assert_close(shuffled.cluster_centers_, plain.cluster_centers_)


def test_empty_clusters_move_to_the_farthest_points() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(100, 4, generator=generator)
    points[17] = 50.0
    points[63] = -60.0
    start = torch.zeros(4, 4)
    start[1] += 1
    start[2:] = 300.0  # two that no point is near to
    once = MiniBatchKMeans(4, init=start, max_iter=1).fit(points)
    nearest = torch.cdist(points, start, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    nearest[[17, 63]] = -1  # the points that were moved are no longer in their old clusters' means
    for cluster in (0, 1):
        torch.testing.assert_close(once.cluster_centers_[cluster], points[nearest == cluster].mean(0))
    kmeans = MiniBatchKMeans(4, init=start).fit(points)
    assert kmeans.epoch_stats_[0].empty_clusters == kmeans.epoch_stats_[0].reseeded == 2
    assert int((kmeans.counts_ == 0).sum()) == 0
    assert kmeans.counts_[kmeans.labels_[17]] == kmeans.counts_[kmeans.labels_[63]] == 1
    torch.testing.assert_close(kmeans.cluster_centers_[kmeans.labels_[63]], points[63])


@pytest.mark.parametrize("distinct", [1, 3])
def test_fewer_distinct_points_than_clusters(distinct: int) -> None:
    values = torch.randn(distinct, 50, generator=torch.Generator().manual_seed(0)) * 5
    points = values.repeat(20, 1)
    kmeans = MiniBatchKMeans(5, random_state=0).fit(points)
    assert kmeans.inertia_ == pytest.approx(0, abs=1e-2)  # rounding; the scatter is 60,000
    assert int((kmeans.counts_ > 0).sum()) == distinct
    assert bool(kmeans.cluster_centers_.isfinite().all())
    with pytest.warns(RuntimeWarning, match=f"{5 - distinct} of 5 clusters are empty"):
        found = cluster_stream(points, 5, seed=0)
    assert found.inertia == pytest.approx(0, abs=1e-2)
    assert sorted(found.counts.tolist()) == [0] * (5 - distinct) + [20] * distinct
    # Every row is one of the points, also where nothing is left to belong to it.
    assert torch.cdist(found.centroids, values).amin(1).max() < 1e-4


def test_as_many_clusters_as_points() -> None:
    points = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    kmeans = MiniBatchKMeans(6, random_state=0).fit(points)
    assert kmeans.counts_.tolist() == [1] * 6
    torch.testing.assert_close(kmeans.cluster_centers_[kmeans.labels_], points)


def test_partial_fit_keeps_running_means() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([[-10.0, 0.0], [10.0, 0.0]])
    kmeans = MiniBatchKMeans(2, init=start, reassignment_ratio=0)
    batches = [start.repeat(8, 1) + torch.randn(16, 2, generator=generator) for _ in range(5)]
    for batch in batches:
        kmeans.partial_fit(batch)
    seen = torch.cat(batches)
    # While no point changes sides the running mean is the mean of all points so far.
    torch.testing.assert_close(kmeans.cluster_centers_[0], seen[::2].mean(0))
    torch.testing.assert_close(kmeans.cluster_centers_[1], seen[1::2].mean(0))
    assert kmeans.counts_.tolist() == [40, 40]


def test_partial_fit_learns_and_revives_starved_clusters(points: Tensor) -> None:
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0)).repeat(4)
    kmeans = MiniBatchKMeans(20, random_state=0)
    for batch in points[order].split(50):
        kmeans.partial_fit(batch)
    full = MiniBatchKMeans(20, random_state=0).fit(points)
    reached = inertia_of(points, kmeans.cluster_centers_, kmeans.predict(points))
    assert reached < 1.1 * full.inertia_
    far = torch.zeros(3, 2)
    far[2] = 1e5
    far[1] = 1
    starved = MiniBatchKMeans(3, init=far, random_state=0)
    for _ in range(4):
        starved.partial_fit(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)))
    assert starved.cluster_centers_.abs().max() < 10


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (torch.randn(3, 4), ValueError, "3 samples are fewer than the 5 clusters"),
        (
            [torch.randn(8, 4), torch.randn(8, 3)],
            ValueError,
            "sample at position 8 has 3 features, expected 4",
        ),
        (iter([torch.randn(8, 4)]), TypeError, "re-iterable"),
        ([torch.ones(8, 4, dtype=torch.int64)], TypeError, "floating tensors"),
        ([torch.randn(8)], ValueError, r"expected batches \[b, F\]"),
        ([], ValueError, "0 samples are fewer"),
        ([(torch.randn(8, 4), torch.arange(7))], ValueError, "8 rows with sample indices of shape"),
        ([(torch.randn(8, 4), torch.arange(8) % 7)], ValueError, r"occur more than once, \[0\]"),
    ],
)
def test_bad_points_are_refused(source: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MiniBatchKMeans(5).fit(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_sample_with_a_bad_feature_is_named(bad: float) -> None:
    points = torch.ones(30, 6)
    points[23, 4] = bad
    numbered = [(points[:20], torch.arange(100, 120)), (points[20:], torch.arange(120, 130))]
    for run in (
        lambda: MiniBatchKMeans(2).fit(points),
        lambda: cluster_stream(points, 2, seed=0),
        lambda: MiniBatchKMeans(2).partial_fit(points),
    ):
        with pytest.raises(ValueError, match="sample at position 23 has a NaN or infinite feature"):
            run()
    with pytest.raises(ValueError, match="sample 123 has a NaN or infinite feature"):
        cluster_stream(numbered, 2, seed=0)


def test_features_beyond_float32_squares_are_refused_and_not_taken_for_infinite() -> None:
    # Norm 2^62 is the largest whose squared distances, 4 times its square, are finite with some room.
    points = torch.full((30, 64), 2.0**58)
    points[::2] *= -1
    points += torch.arange(30)[:, None] % 4 * 2.0**50 - 2.0**55
    found = [
        (kmeans.labels_, kmeans.counts_)
        for kmeans in (
            MiniBatchKMeans(2, random_state=0).fit(points),
            MiniBatchKMeans(2, random_state=0).fit([points]),
        )
    ]
    two_pass = cluster_stream(points, 2, seed=0, sketch_width=16)
    for labels, counts in (*found, (two_pass.labels, two_pass.counts)):
        assert counts.tolist() == [15, 15]
        assert labels[::2].unique().numel() == labels[1::2].unique().numel() == 1
    points[7] *= 16
    for run in (
        lambda: MiniBatchKMeans(2).fit(points),
        lambda: MiniBatchKMeans(2).partial_fit(points),
        lambda: cluster_stream([points], 2, seed=0),
    ):
        with pytest.raises(
            ValueError, match=r"sample at position 7 has features as large as [45].*e\+18: expected a norm"
        ):
            run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "n_clusters: expected at least 1, got 0"),
        ({"n_clusters": 2, "tol": -1}, "tol"),
        ({"n_clusters": 2, "tol": float("nan")}, "tol"),
        ({"n_clusters": 2, "init": "best"}, "init: expected 'k-means\\+\\+', 'random'"),
        ({"n_clusters": 2, "init": torch.ones(3, 4)}, "init: .* K = 2"),
        ({"n_clusters": 2, "init": 3}, "init: .* got int"),
        ({"n_clusters": 2, "batch_size": 0}, "batch_size"),
        ({"n_clusters": 2.0}, "n_clusters: expected an integer, got 2.0"),
        ({"n_clusters": 2, "max_iter": True}, "max_iter: expected an integer, got True"),
        ({"n_clusters": 2, "max_no_improvement": 0}, "max_no_improvement"),
        ({"n_clusters": 2, "reassignment_ratio": -0.1}, "reassignment_ratio"),
        ({"n_clusters": 2, "random_state": "7"}, "random_state: expected an integer"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    kmeans = MiniBatchKMeans(**arguments)  # type: ignore[arg-type]
    for use in (kmeans.fit, kmeans.partial_fit):
        with pytest.raises((ValueError, TypeError), match=message):
            use(torch.randn(9, 4))


def test_use_before_fit_and_wrong_width_are_refused(points: Tensor) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        MiniBatchKMeans(2).predict(points)
    fitted = MiniBatchKMeans(2, random_state=0, max_iter=1).fit(points)
    for use in (fitted.predict, fitted.transform, fitted.partial_fit):
        with pytest.raises(ValueError, match="has 9 features, expected 3000"):
            use(points[:, :9])
    with pytest.raises(ValueError, match="first batch has 3 samples, fewer than the 5"):
        MiniBatchKMeans(5).partial_fit(points[:3])


# --- scikit-learn's interface ---------------------------------------------------------------------------------


@parametrize_with_checks([StreamKMeans(3), MiniBatchKMeans(3), MiniBatchKMeans(2, "random", tol=1e-3)])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_arrays_give_arrays_and_tensors_give_tensors(points: Tensor) -> None:
    tensors = MiniBatchKMeans(10, random_state=2).fit(points)
    arrays = MiniBatchKMeans(10, random_state=2).fit(points.numpy())
    names = ("cluster_centers_", "labels_", "counts_")
    for name in names:
        assert isinstance(getattr(tensors, name), Tensor)
        assert isinstance(getattr(arrays, name), np.ndarray)
        np.testing.assert_array_equal(getattr(arrays, name), getattr(tensors, name).numpy())
    assert arrays.inertia_ == tensors.inertia_
    assert arrays.n_features_in_ == tensors.n_features_in_ == 3000
    for kmeans in (tensors, arrays):
        for use in (kmeans.predict, kmeans.transform):
            as_array, as_tensor = use(points.numpy()), use(points)
            assert isinstance(as_array, np.ndarray)
            assert isinstance(as_tensor, Tensor)
            np.testing.assert_array_equal(as_array, as_tensor.numpy())
    partial = [MiniBatchKMeans(10, random_state=2) for _ in range(2)]
    for batch in points.split(100):
        partial[0].partial_fit(batch)
        partial[1].partial_fit(batch.numpy())
    for name in names:
        np.testing.assert_array_equal(getattr(partial[1], name), getattr(partial[0], name).numpy())
    assert isinstance(partial[1].cluster_centers_, np.ndarray)
    # What was handed out is never written to again.
    before = [getattr(partial[1], name) for name in names]
    copied = [array.copy() for array in before]
    partial[1].partial_fit(points[:100].numpy())
    for array, copy in zip(before, copied, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_lists_of_numbers_are_points_and_lists_of_tensors_are_batches(points: Tensor) -> None:
    few = points[:30, :4]
    kmeans = StreamKMeans(3, random_state=0)
    rows = kmeans.fit_predict(few.double().tolist())
    assert isinstance(rows, np.ndarray)
    batches = kmeans.fit_predict([few[:10], few[10:]])
    assert isinstance(batches, Tensor)
    np.testing.assert_array_equal(rows, batches.numpy())
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        kmeans.fit(sparse.csr_matrix(few.numpy()))
    with pytest.raises(ValueError, match="NaN"):
        kmeans.fit(few.numpy() * np.nan)


def test_float64_points_are_clustered_in_float64() -> None:
    """The inertia is exact to more digits than float32 has."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.zeros(20, 3), torch.ones(20, 3)]).double()
    points += 1e-3 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    for source in (points, list(points.split(7)), points.numpy()):
        kmeans = StreamKMeans(2, random_state=0).fit(source)
        labels = torch.as_tensor(kmeans.labels_)
        means = torch.stack([points[labels == cluster].mean(0) for cluster in range(2)])
        torch.testing.assert_close(torch.as_tensor(kmeans.cluster_centers_), means.float(), rtol=0, atol=0)
        exact = float((points - torch.as_tensor(kmeans.cluster_centers_).double()[labels]).square().sum())
        assert kmeans.inertia_ == pytest.approx(exact, rel=1e-9)
    found = cluster_stream(list(points.split(7)), 2, seed=0)
    assert found.inertia == pytest.approx(exact, rel=1e-6)


def test_an_estimator_is_cloned_and_takes_part_in_a_pipeline(points: Tensor) -> None:
    start = points[:4, :6].clone()
    kmeans = MiniBatchKMeans(4, start, max_iter=7, reassignment_ratio=0.5, random_state=3)
    copy = clone(kmeans)
    assert torch.equal(copy.init, start)
    ours = {name: value for name, value in copy.get_params().items() if name != "init"}
    assert ours == {name: value for name, value in kmeans.get_params().items() if name != "init"}
    assert ours["reassignment_ratio"] == 0.5
    kmeans.set_params(n_clusters=3, init="k-means++")
    pipeline = make_pipeline(StandardScaler(), kmeans)
    distances = pipeline.fit_transform(points[:60, :6].numpy())
    assert distances.shape == (60, 3)
    assert list(pipeline.get_feature_names_out()) == [f"minibatchkmeans{i}" for i in range(3)]


def test_random_states(points: Tensor) -> None:
    few = points[:100, :50]

    def labels(random_state: Any) -> Tensor:
        found: Tensor = StreamKMeans(5, random_state=random_state, max_iter=1).fit(few).cluster_centers_
        return found

    assert torch.equal(labels(4), labels(np.int64(4)))
    state = np.random.RandomState(0)
    first, second = labels(state), labels(state)
    assert torch.equal(first, labels(np.random.RandomState(0)))
    assert not torch.equal(first, second)
    assert not torch.equal(labels(None), labels(None))


def test_centroids_to_start_from_have_the_width_that_is_said(points: Tensor) -> None:
    start = points[:3, :8].clone()
    with pytest.raises(ValueError, match=r"init: expected centroids \[K, F\] with F = 9, got \[3, 8\]"):
        StreamKMeans(3, start).fit([points[:, :8]], features=9)
    narrow = StreamKMeans(3, start, max_iter=2).fit([points[:, :8], points[:, :5]], features=8)
    padded = torch.nn.functional.pad(points[:, :5], (0, 3))
    wide = StreamKMeans(3, start.numpy(), max_iter=2).fit(torch.cat([points[:, :8], padded]))
    assert torch.equal(narrow.labels_, wide.labels_)
    torch.testing.assert_close(narrow.cluster_centers_, wide.cluster_centers_)


# --- two passes -------------------------------------------------------------------------------------------------


def test_two_passes_reach_sklearns_inertia(points: Tensor, sklearn_inertia: float) -> None:
    runs = [cluster_stream(points, 20, seed=seed, sketch_width=1024) for seed in range(3)]
    assert np.mean([run.inertia for run in runs]) <= 1.01 * sklearn_inertia
    refined = [cluster_stream(points, 20, seed=seed, sketch_width=1024, refine=2) for seed in range(3)]
    assert np.mean([run.inertia for run in refined]) < np.mean([run.inertia for run in runs])


def test_the_restart_with_the_lowest_inertia_is_kept(points: Tensor) -> None:
    narrow = points[:200, :40]  # the sketch is the points, whatever its seed
    runs = [cluster_stream(narrow, 20, seed=seed, restarts=1) for seed in range(4)]
    assert len({run.sketch_inertia for run in runs}) == 4
    best = min(runs, key=lambda run: run.sketch_inertia)
    found = cluster_stream(narrow, 20, seed=0, restarts=4)
    assert found.sketch_inertia == best.sketch_inertia
    assert torch.equal(found.labels, best.labels)
    assert found.epochs == [run.epochs[0] for run in runs]
    assert [epoch.inertia for epoch in found.sketch_stats] == [epoch.inertia for epoch in best.sketch_stats]


@pytest.mark.parametrize("refine", [0, 1])
def test_centroids_and_inertia_are_exact_in_the_features(points: Tensor, refine: int) -> None:
    found = cluster_stream(points, 20, seed=0, sketch_width=256, refine=refine)
    assert found.num_samples == 500
    assert torch.equal(found.labels.bincount(minlength=20), found.counts)
    assert found.inertia == pytest.approx(inertia_of(points, found.centroids, found.labels), rel=1e-6)
    if not refine:
        for cluster in range(20):
            mean = points[found.labels == cluster].double().mean(0)
            torch.testing.assert_close(found.centroids[cluster].double(), mean, rtol=1e-6, atol=1e-6)


def test_the_points_are_read_twice_however_long_k_means_takes(points: Tensor) -> None:
    readings = []

    def stream() -> Iterator[Tensor]:
        readings.append(0)
        yield from points.split(100)

    found = cluster_stream(stream, 20, seed=0, sketch_width=256)
    assert sum(found.epochs) > 20
    assert len(readings) == 2
    cluster_stream(stream, 20, seed=0, sketch_width=256, refine=1)
    assert len(readings) == 2 + 2 + 2


@pytest.mark.parametrize(
    ("arguments", "epochs", "labels"),
    [
        ({"refine": 1}, 1, 1),
        ({"refine": 2}, 2, 1),
        ({"algorithm": "lloyd", "max_iter": 3}, 3, 1),
        ({"algorithm": "lloyd"}, None, 0),  # until the centroids stay where they are
    ],
)
def test_passes_of_exact_epochs(
    points: Tensor, arguments: dict[str, Any], epochs: int | None, labels: int
) -> None:
    readings = []

    def stream() -> Iterator[Tensor]:
        readings.append(0)
        yield from points.split(100)

    found = cluster_stream(stream, 20, seed=0, sketch_width=8, restarts=1, **arguments)
    assert all(epoch.empty_clusters == 0 for epoch in found.exact_stats)
    assert epochs in (None, len(found.exact_stats))
    assert len(readings) == 2 + len(found.exact_stats) + labels


def test_an_epoch_that_finds_empty_clusters_takes_a_pass_for_far_points() -> None:
    readings = []

    def stream() -> Iterator[Tensor]:
        readings.append(0)
        yield torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1)

    found = cluster_stream(stream, 10, seed=0, algorithm="lloyd")
    assert [epoch.empty_clusters for epoch in found.exact_stats] == [4]
    assert len(readings) == 2 + 1 + 1  # the start, the epoch, the far points; nothing moved


def test_batches_padded_to_their_own_longest_change_nothing() -> None:
    points = text_like(120, 2400)
    points[:60, 1500:] = 0
    points[60:, 2100:] = 0
    numbers = torch.arange(120)
    narrow = [(points[:60, :1500], numbers[:60]), (points[60:, :2100], numbers[60:])]
    for width in (300, 4096):
        wide = cluster_stream([(points, numbers)], 7, seed=0, features=2400, sketch_width=width)
        short = cluster_stream(narrow, 7, seed=0, features=2400, sketch_width=width)
        assert torch.equal(short.labels, wide.labels)
        torch.testing.assert_close(short.centroids, wide.centroids)
        assert short.inertia == pytest.approx(wide.inertia, rel=1e-6)


def test_half_precision_features_are_summed_exactly() -> None:
    points = text_like(200, 1000).bfloat16()
    found = cluster_stream(points, 5, seed=0)
    mean = points[found.labels == 0].double().mean(0)
    torch.testing.assert_close(found.centroids[0].double(), mean, rtol=1e-6, atol=1e-6)


def test_passes_that_differ_are_refused(points: Tensor) -> None:
    def changing(second: object) -> object:
        readings = iter([[(points, torch.arange(500))], second])
        return lambda: next(readings)

    swapped = torch.arange(500)
    swapped[[3, 4]] = swapped[[4, 3]]
    other = points.clone()
    other[41] *= 1.1
    for second, message in (
        ([(points, swapped)], "position 3 is sample 4, it was sample 3"),
        ([(other, torch.arange(500))], "sample 41 has norm"),
        ([(points[:499], torch.arange(499))], "499 samples in the second pass, 500 in the first"),
        ([(points, torch.arange(500)), (points[:1], torch.tensor([500]))], "more samples in the second pass"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster_stream(changing(second), 5, seed=0, sketch_width=64)  # type: ignore[arg-type]


# --- several processes ------------------------------------------------------------------------------------------


def test_collectives_of_one_process_are_the_identity() -> None:
    alone = Collectives()
    rows = torch.arange(6.0).view(3, 2)
    assert alone.sum_(rows) is alone.broadcast_(rows) is alone.gather_rows(rows) is rows
    assert alone.gather_rows_to_first(rows) is rows
    assert alone.gather_sizes(4) == [4]
    assert alone.run_on_all_ranks(lambda: 5) == 5


def _shares(world_size: int) -> list[Tensor]:
    """Ragged, interleaved shards of 90 samples."""
    sizes = {1: [90], 2: [51, 39], 4: [1, 40, 17, 32]}[world_size]
    order = torch.randperm(90, generator=torch.Generator().manual_seed(world_size))
    return list(order.split(sizes))


def _worker(rank: int, world_size: int, folder: Path) -> None:
    """One process of the test below; writes what it found to ``folder``."""
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    points = text_like(90, 1500)
    points[5] += 30
    share = _shares(world_size)[rank]
    source = [(points[part], part) for part in share.split(16)]
    two_pass = cluster_stream(source, 6, seed=0, sketch_width=256)
    refined = cluster_stream(source, 6, seed=0, sketch_width=256, refine=1)
    start = points[:6].clone()
    start[2] = 1e3  # empty at first
    kmeans = MiniBatchKMeans(6, init=start).fit(source)
    assert torch.equal(cluster_stream(source, 6, seed=0, sketch_width=256).centroids, two_pass.centroids)
    assert torch.equal(MiniBatchKMeans(6, init=start).fit(source).cluster_centers_, kmeans.cluster_centers_)
    drawn = MiniBatchKMeans(6, random_state=3).fit(source)
    errors = []
    if world_size > 1:
        poisoned = points.clone()
        poisoned[int(_shares(world_size)[1][0])] = float("nan")
        bad = {
            "nan": [(poisoned[share], share)],
            "twice": [(points[share], share % 60)],
            "few": [(points[share[:1]], share[:1])],
            "none": [] if rank else [(points, torch.arange(90))],
        }
        for source in bad.values():
            try:
                cluster_stream(source, 6, seed=0)
            except (ValueError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
    report = {
        "counts": two_pass.counts.tolist(),
        "inertia": [two_pass.inertia, refined.inertia, kmeans.inertia_, drawn.inertia_],
        "reseeded": kmeans.epoch_stats_[0].reseeded,
        "errors": errors,
    }
    (folder / f"report{rank}.json").write_text(json.dumps(report))
    centroids = [two_pass.centroids, refined.centroids, kmeans.cluster_centers_, drawn.cluster_centers_]
    np.save(folder / f"centroids{rank}.npy", torch.stack(centroids).numpy())
    labels = torch.stack([share, two_pass.labels, refined.labels, kmeans.labels_, drawn.labels_])
    np.save(folder / f"labels{rank}.npy", labels.numpy())
    if world_size > 1:
        torch.distributed.destroy_process_group()


def _run_processes(folder: Path) -> None:
    """Run one process, then two, then four. They are forks of this one, which has everything imported already."""
    torch.set_num_threads(1)
    for world_size in (1, 2, 4):
        own = folder / str(world_size)
        own.mkdir()
        if world_size == 1:
            _worker(0, 1, own)
            continue
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_worker, args=(rank, world_size, own)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{world_size} processes: {[process.exitcode for process in processes]}")


def _found(folder: Path, world_size: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Reports of all processes, their centroids, and the labels in the order of the samples."""
    ranks = range(world_size)
    reports = [json.loads((folder / f"report{rank}.json").read_text()) for rank in ranks]
    centroids = [torch.from_numpy(np.load(folder / f"centroids{rank}.npy")) for rank in ranks]
    for other in centroids[1:]:
        assert torch.equal(other, centroids[0])
    labels = torch.cat([torch.from_numpy(np.load(folder / f"labels{rank}.npy")) for rank in ranks], dim=1)
    return reports, centroids[0], labels[1:, labels[0].argsort()]


@pytest.mark.launcher
def test_any_number_of_processes_gives_the_same(tmp_path: Path) -> None:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    [alone], centroids, labels = _found(tmp_path / "1", 1)
    assert alone["reseeded"] == 1
    for world_size in (2, 4):
        reports, others, other_labels = _found(tmp_path / str(world_size), world_size)
        assert torch.equal(other_labels, labels)
        torch.testing.assert_close(others, centroids, rtol=1e-5, atol=1e-5)
        for rank, report in enumerate(reports):
            assert report["counts"] == alone["counts"]
            assert report["inertia"] == pytest.approx(alone["inertia"], rel=1e-5)
            assert report["reseeded"] == 1
            # A failure in one process is one in all of them, and each knows what it can know.
            nan, twice, few, none = report["errors"]
            owner = int(_shares(world_size)[1][0])
            assert (f"sample {owner} has a NaN" if rank == 1 else "stopped because process 1 of") in nan
            assert "occur more than once" in twice
            assert f"{world_size} samples are fewer than the 6 clusters" in few
            assert ("this process has no sample" if rank else "stopped because process 1 of") in none


if __name__ == "__main__":
    _run_processes(Path(sys.argv[1]))
