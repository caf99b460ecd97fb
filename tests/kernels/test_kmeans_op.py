"""fsd_kernels.kmeans: assignment and update against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsd_kernels.kmeans import assign, eager, nearest, reference, update, update_

BACKENDS = ["reference", "eager"]
# rows, clusters, features; blocks of eager are 4096 rows, its products 512 and 49152 features where points lie, and
# 256 and 2032 of points that it copies.
SHAPES = [(1, 1, 1), (7, 3, 5), (300, 17, 2033), (1030, 100, 1300), (4100, 3, 70), (5, 3, 49_200)]
# dtype, relative tolerance of squared distances and sums
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)]


def clustered(
    rows: int, clusters: int, features: int, seed: int = 0, offset: float = 40
) -> tuple[Tensor, Tensor]:
    """Points around centroids, with an offset that all share in every 50th feature, 40 times their spread."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(clusters, features, generator=generator, dtype=torch.float64)
    centroids[:, ::50] += offset
    owner = torch.randint(clusters, (rows,), generator=generator)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return centroids[owner] + 0.5 * noise, centroids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize(("rows", "clusters", "features"), SHAPES)
def test_assign_is_the_nearest_centroid(
    rows: int, clusters: int, features: int, offset: float, dtype: torch.dtype, rtol: float, backend: str
) -> None:
    points, centroids = clustered(rows, clusters, features, offset=offset)
    points, centroids = points.to(dtype), centroids.to(dtype)
    true = torch.cdist(
        points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    labels, distances = assign(points, centroids, backend=backend)
    assert torch.equal(nearest(points, centroids, backend=backend), labels)
    assert labels.dtype == torch.int64
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Equal up to rounding, where two centroids may be equally near (few features in a narrow dtype).
    torch.testing.assert_close(true.gather(1, labels[:, None]).squeeze(1), true.amin(1), rtol=rtol, atol=rtol)
    torch.testing.assert_close(distances.double(), true.amin(1), rtol=10 * rtol, atol=rtol * features)


def test_a_large_common_offset_takes_no_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(20, 3000, generator=generator)
    owner = torch.randint(20, (400,), generator=generator)
    points = centroids[owner] + torch.randn(400, 3000, generator=generator)
    offset = 4096.0
    # What float32 holds of the shifted features is the input; rounding them is not the op's error.
    points, centroids = points + offset, centroids + offset
    truth, squared = assign(points.double(), centroids.double(), backend="reference")
    labels, distances = assign(points, centroids, backend="eager")
    unshifted = torch.addmm(centroids.square().sum(1), points, centroids.t(), alpha=-2).argmin(1)
    assert (unshifted != truth).float().mean() > 0.1  # the trap is real
    assert torch.equal(labels, truth)
    assert ((distances - squared).abs() / squared).max() < 1e-5


@pytest.mark.parametrize("every", [1, 250])
@pytest.mark.parametrize("offset", [0.0, 1.0, 3.9, 4.1, 16.0, 1000.0])
def test_offsets_around_the_one_where_points_are_shifted(offset: float, every: int) -> None:
    """||m||^2 is ``offset`` times the mean ||c_k - m||^2, and so ||c_j||^2 is offset + 1 and ||c_k - c_j||^2 is 2."""
    generator = torch.Generator().manual_seed(6)
    centroids = 0.1 * torch.randn(50, 20_000, generator=generator)
    centroids -= centroids.mean(0)
    owner = torch.randint(50, (600,), generator=generator)
    points = centroids[owner] + torch.randn(600, 20_000, generator=generator)
    common = torch.zeros(20_000)
    common[::every] = (offset * centroids.square().sum(1).mean() / len(common[::every])).sqrt()
    points, centroids = points + common, centroids + common
    truth, squared = assign(points.double(), centroids.double(), backend="reference")
    with _LargestNew(points) as seen:
        labels, distances = eager.assign(points, centroids)
    assert torch.equal(labels, truth)
    assert ((distances - squared).abs() / squared).max() < 2e-6
    # Shifted points are copied, in tiles that are larger than these centroids; the others are not copied at all.
    assert (seen.bytes > centroids.nbytes) == (offset > 4)


@pytest.mark.parametrize("offset", [0.0, 4096.0])
def test_a_centroid_that_is_far_from_the_others_takes_no_digits(offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(20, 3000, generator=generator)
    owner = torch.randint(19, (400,), generator=generator)
    points = centroids[owner] + torch.randn(400, 3000, generator=generator) + offset
    centroids += offset
    centroids[19] = 1e6
    truth, squared = assign(points.double(), centroids.double(), backend="reference")
    labels, distances = assign(points, centroids, backend="eager")
    assert torch.equal(labels, truth)
    assert ((distances - squared).abs() / squared).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    one = torch.randn(1, 2050, generator=generator)
    # Copies at places that fall into different blocks of a matrix product.
    centroids = torch.randn(103, 2050, generator=generator)
    for place in (5, 6, 40, 96, 101, 102):
        centroids[place] = one
    points = one + 0.01 * torch.randn(300, 2050, generator=generator)
    assert assign(points, centroids, backend=backend)[0].eq(5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, 1, 1500, 2033])
def test_narrow_points_are_points_with_zeros(width: int, backend: str) -> None:
    points, centroids = clustered(60, 9, 2500)
    points = points[:, :width].float()
    centroids[::2, width:] *= 0.05
    centroids = centroids.float()
    padded = torch.nn.functional.pad(points, (0, 2500 - width))
    labels, distances = assign(points, centroids, backend=backend)
    truth, squared = assign(padded.double(), centroids.double(), backend="reference")
    assert torch.equal(labels, truth)
    scatter = (padded - centroids.mean(0)).square().sum(1).max().item()
    torch.testing.assert_close(distances.double(), squared, rtol=1e-5, atol=1e-6 * scatter)
    sums = torch.zeros(9, 2500)
    counts = torch.zeros(9, dtype=torch.int64)
    update_(sums, counts, points, labels, backend=backend)
    expected, expected_counts = update(padded, labels, 9, backend="reference")
    torch.testing.assert_close(sums, expected)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_update_sums_and_counts(dtype: torch.dtype, rtol: float, backend: str) -> None:
    points, _ = clustered(700, 12, 1500)
    points = points.to(dtype)
    labels = torch.randint(11, (700,), generator=torch.Generator().manual_seed(3))
    labels[labels == 4] = 5
    one_hot = torch.nn.functional.one_hot(labels, 12).double()
    sums, counts = update(points, labels, 12, backend=backend)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), one_hot.t() @ points.double(), rtol=rtol, atol=700 * rtol)
    assert torch.equal(counts, one_hot.sum(0).long())
    assert counts[4] == counts[11] == 0
    assert not sums[[4, 11]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_sums_in_float64_are_exact(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(640, 300, generator=generator) + 1e4
    labels = torch.randint(5, (640,), generator=generator)
    sums = torch.zeros(5, 300, dtype=torch.float64)
    counts = torch.zeros(5, dtype=torch.int64)
    for start in range(0, 640, 37):
        update_(sums, counts, points[start : start + 37], labels[start : start + 37], backend=backend)
    expected, expected_counts = update(points.double(), labels, 5, backend="reference")
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)
    assert torch.equal(counts, expected_counts)


def test_same_bits_on_every_call() -> None:
    points, centroids = clustered(500, 30, 2500)
    points, centroids = points.float(), centroids.float()
    first = assign(points, centroids)
    second = assign(points, centroids)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(update(points, first[0], 30)[0], update(points, first[0], 30)[0])


def test_product_form_of_the_update() -> None:
    """The form that devices other than the CPU use, where index_add_ is not deterministic."""
    points, _ = clustered(200, 6, 900)
    labels = torch.randint(6, (200,), generator=torch.Generator().manual_seed(5))
    by_rows, by_products = torch.ones(6, 900).double(), torch.ones(6, 900).double()
    eager._add_rows(by_rows, points, labels)
    eager._add_products(by_products, points, labels)
    torch.testing.assert_close(by_products, by_rows, rtol=1e-12, atol=1e-12)


def test_views_are_read_as_they_are() -> None:
    points, centroids = clustered(90, 8, 1200)
    points, centroids = points.float(), centroids.float()
    strided_points = torch.stack([points, -points], dim=2)[:, :, 0]
    strided_centroids = centroids.t().contiguous().t()
    assert not strided_points.is_contiguous()
    labels, distances = assign(points, centroids)
    strided = assign(strided_points, strided_centroids)
    assert torch.equal(labels, strided[0])
    torch.testing.assert_close(distances, strided[1])
    torch.testing.assert_close(update(strided_points, labels, 8)[0], update(points, labels, 8)[0])


class _LargestNew(TorchDispatchMode):
    """Records how many bytes the largest tensor takes that an operation returns, views of ``known`` apart."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_no_temporary_of_the_size_of_the_points() -> None:
    points = torch.zeros(1200, 20_000, dtype=torch.bfloat16)
    centroids, labels = torch.zeros(4, 20_000), torch.zeros(1200, dtype=torch.int64)
    with _LargestNew(points) as whole:
        points.float()
    assert whole.bytes == 2 * points.nbytes  # the instrument works
    with _LargestNew(points) as assigning:
        eager.assign(points, centroids)
    with _LargestNew(points) as updating:
        eager.update_(torch.zeros(4, 20_000), torch.zeros(4, dtype=torch.int64), points, labels)
    assert 0 < assigning.bytes < 0.1 * points.nbytes
    assert 0 < updating.bytes < 0.1 * points.nbytes
    wide = torch.randn(600, 5000, generator=torch.Generator().manual_seed(0))
    with _LargestNew(wide) as in_place:
        eager.assign(wide, wide[:4].clone())
    assert 0 < in_place.bytes < 0.01 * wide.nbytes


def test_empty_batch() -> None:
    labels, distances = assign(torch.empty(0, 5), torch.ones(2, 5))
    assert labels.shape == distances.shape == (0,)
    sums, counts = update(torch.empty(0, 5), labels, 2)
    assert not sums.any()
    assert counts.tolist() == [0, 0]


def test_compiles_whole_and_is_registered_properly() -> None:
    points, centroids = clustered(40, 5, 30)
    points, centroids = points.float(), centroids.float()

    def step(points: Tensor, centroids: Tensor) -> Tensor:
        labels, distances = assign(points, centroids)
        sums, counts = update(points, labels, 5)
        return sums.sum() + counts.sum() + distances.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points, centroids), step(points, centroids))
    ops = torch.ops.fsd_kernels
    torch.library.opcheck(ops.kmeans_assign.default, (points, centroids, "eager"))
    torch.library.opcheck(ops.kmeans_nearest.default, (points, centroids, "eager"))
    labels = assign(points, centroids)[0]
    state = (torch.zeros(5, 30), torch.zeros(5, dtype=torch.int64))
    torch.library.opcheck(ops.kmeans_update_.default, (*state, points, labels, "eager"))


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="kmeans: backend 'triton' was asked for, but"):
        assign(torch.ones(2, 2), torch.ones(1, 2), backend="triton")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), torch.ones(2, 4)), ValueError, r"points: expected \[N, F\], got shape \[3\]"),
        ((torch.ones(3, 4).long(), torch.ones(2, 4)), TypeError, "points: .*int64"),
        ((torch.ones(3, 5), torch.ones(2, 4)), ValueError, "points: 5 features, .* only 4"),
        ((torch.ones(3, 4), torch.ones(0, 4)), ValueError, "centroids: .* at least one row"),
    ],
)
def test_assign_says_what_is_wrong(arguments: tuple[Tensor, Tensor], error: type, message: str) -> None:
    for function in (assign, nearest):
        with pytest.raises(error, match=message):
            function(*arguments)


@pytest.mark.parametrize(
    ("labels", "clusters", "error", "message"),
    [
        (torch.tensor([0, 2]), 2, ValueError, r"labels: expected values in \[0, 2\), got 0 to 2"),
        (torch.tensor([0, -1]), 2, ValueError, "got -1 to 0"),
        (torch.tensor([0]), 2, ValueError, r"labels: expected \[N\] = \[2\], got \[1\]"),
        (torch.tensor([0.0, 1.0]), 2, TypeError, "int64"),
        (torch.tensor([0, 0]), 0, ValueError, "num_clusters"),
    ],
)
def test_update_says_what_is_wrong(labels: Tensor, clusters: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        update(torch.ones(2, 3), labels, clusters)


def test_reference_is_the_definition() -> None:
    """By hand: two centroids on a line, three points."""
    labels, distances = reference.assign(torch.tensor([[0.0], [4.0], [5.0]]), torch.tensor([[1.0], [7.0]]))
    assert labels.tolist() == [0, 0, 1]
    assert distances.tolist() == [1.0, 9.0, 4.0]
    sums, counts = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    reference.update_(sums, counts, torch.tensor([[0.0], [4.0], [5.0]]), labels)
    assert sums.tolist() == [[4.0], [5.0]]
    assert counts.tolist() == [2, 1]
