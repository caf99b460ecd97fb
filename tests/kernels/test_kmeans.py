"""k-means on every backend: assignment and update against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsd_kernels import _triton as shared
from fsd_kernels.kmeans import assign, eager, nearest, reference, update, update_
from fsd_kernels.kmeans import triton as kernels
from tests.interpreted import (
    DEVICE,
    INTERPRETED,
    forbid_stray_accesses,
    framed,
    on_gpu,
    on_triton,
    record_launches,
    round_dots,
)

BACKENDS = ["reference", "eager"]


# rows, clusters, features; blocks of eager are 4096 rows, its products 512 and 49152 features where points lie, and
# 256 and 2032 of points that it copies.
SHAPES = [(1, 1, 1), (7, 3, 5), (300, 17, 2033), (1030, 100, 1300), (4100, 3, 70), (5, 3, 49_200)]


# dtype, relative tolerance of squared distances and sums
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)]


def clustered(
    rows: int,
    clusters: int,
    features: int,
    seed: int = 0,
    spread: float = 0.5,
    offset: float = 40.0,
    every: int = 50,
) -> tuple[Tensor, Tensor]:
    """Points around centroids, with an offset that all share in some features, 40 times the centroids' spread."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(clusters, features, generator=generator, dtype=torch.float64)
    centroids[:, ::every] += offset
    owner = torch.randint(clusters, (rows,), generator=generator)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return centroids[owner] + spread * noise, centroids


# --- assignment ------------------------------------------------------------------------------------------------------


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


# --- update ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=pytest.mark.triton)])
def test_running_sums_in_float64_are_exact(backend: str) -> None:
    device = DEVICE if backend == "triton" else torch.device("cpu")
    generator = torch.Generator().manual_seed(4)
    points = (torch.randn(640, 300, generator=generator) + 1e4).to(device)
    labels = torch.randint(5, (640,), generator=generator).to(device)
    sums = torch.zeros(5, 300, dtype=torch.float64, device=device)
    counts = torch.zeros(5, dtype=torch.int64, device=device)
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
    """Records how many bytes the largest tensor takes that an operation returns, views of ``ignored`` apart."""

    def __init__(self, ignored: Tensor) -> None:
        super().__init__()
        self.known = ignored.untyped_storage().data_ptr()
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


def test_reference_is_the_definition() -> None:
    """By hand: two centroids on a line, three points."""
    labels, distances = reference.assign(torch.tensor([[0.0], [4.0], [5.0]]), torch.tensor([[1.0], [7.0]]))
    assert labels.tolist() == [0, 0, 1]
    assert distances.tolist() == [1.0, 9.0, 4.0]
    sums, counts = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    reference.update_(sums, counts, torch.tensor([[0.0], [4.0], [5.0]]), labels)
    assert sums.tolist() == [[4.0], [5.0]]
    assert counts.tolist() == [2, 1]


# --- the Triton kernels ----------------------------------------------------------------------------------------------


EPSILON = 2.0**-24


@pytest.fixture
def few_multiprocessors(multiprocessors: Callable[[int], None]) -> None:
    """Let the heuristics see a single multiprocessor, which keeps them from splitting the features."""
    multiprocessors(1)


@pytest.fixture(params=["whole", "split", "tiled", "split tiled"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> str:
    """Run a test on each way through the kernels; tiles of 16 centroids take few through those for many."""
    name = str(request.param)
    multiprocessors(132 if "split" in name else 1)
    if "tiled" in name:
        monkeypatch.setattr(kernels, "_CENTROIDS", 16)
        monkeypatch.setattr(kernels, "_LAST", 16)
    return name


def clustered_on_device(
    rows: int, clusters: int, features: int, seed: int = 0, spread: float = 0.5, offset: float = 40.0
) -> tuple[Tensor, Tensor]:
    """As ``clustered``, with an offset in every seventh feature, on the device of the kernels."""
    points, centroids = clustered(rows, clusters, features, seed, spread, offset, every=7)
    return points.to(DEVICE), centroids.to(DEVICE)


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(points.double(), (0, centroids.shape[1] - points.shape[1]))
    return torch.cdist(padded, centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def check_assign(points: Tensor, centroids: Tensor, rounding: float = EPSILON) -> tuple[Tensor, Tensor]:
    """Labels and distances are right up to the rounding of ||x - m||^2 and of the product's operands."""
    labels, distances = assign(points, centroids, backend="triton")
    assert labels.dtype == torch.int64
    assert distances.dtype == torch.float32
    assert labels.shape == distances.shape == points.shape[:1]
    true = squared_distances(points, centroids)
    mean = centroids.double().mean(0)
    from_mean = (torch.nn.functional.pad(points.double(), (0, len(mean) - points.shape[1])) - mean).norm(
        dim=1
    )
    scale = (from_mean + (centroids.double() - mean).norm(dim=1).max()) ** 2
    chosen = true.gather(1, labels[:, None]).squeeze(1)
    assert (chosen - true.amin(1) <= 8 * rounding * scale).all()
    assert (distances.double() - chosen).abs().le(8 * rounding * scale).all()
    assert (distances >= 0).all()
    return labels, distances


KERNEL_SHAPES = [
    # rows, clusters, features, columns of the points
    (64, 16, 128, 128),
    (33, 5, 50, 50),
    (1, 7, 40, 40),
    (20, 1, 33, 33),
    (17, 60, 90, 31),
    (9, 4, 70, 0),
    (40, 33, 200, 150),
    (70, 3, 1, 1),
]


@on_triton
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernels_assign_is_the_nearest_centroid(shape: tuple[int, int, int, int], path: str) -> None:
    rows, clusters, features, width = shape
    points, centroids = clustered_on_device(rows, clusters, features)
    check_assign(framed(points.float()[:, :width]), framed(centroids.float()))


@on_triton
@pytest.mark.parametrize("shape", [(300, 100, 150, 120), (70, 300, 64, 64), (20, 400, 70, 40)], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_kernels_assign_with_tiles_of_full_size(
    shape: tuple[int, int, int, int], split: bool, tf32: None, multiprocessors: Callable[[int], None]
) -> None:
    multiprocessors(4 if split else 1)
    rows, clusters, features, width = shape
    points, centroids = clustered_on_device(rows, clusters, features)
    check_assign(framed(points.float()[:, :width]), framed(centroids.float()), on_gpu(2.0**-10, EPSILON))


@on_triton
@pytest.mark.parametrize(
    ("types", "rounding"),
    [
        ((torch.bfloat16, torch.bfloat16), 2.0**-8),
        ((torch.float16, torch.float16), 2.0**-11),
        ((torch.bfloat16, torch.float32), EPSILON),
        ((torch.float32, torch.float16), EPSILON),
    ],
    ids=str,
)
def test_kernels_assign_in_16_bits(
    types: tuple[torch.dtype, torch.dtype], rounding: float, path: str
) -> None:
    points, centroids = clustered_on_device(40, 20, 96)
    check_assign(framed(points.to(types[0])), framed(centroids.to(types[1])), rounding)


@on_triton
def test_kernels_assign_reads_any_strides(path: str) -> None:
    points, centroids = (x.float() for x in clustered_on_device(40, 20, 66))
    transposed = [x.t().contiguous().t() for x in (points, centroids)]
    sliced = [torch.stack([x, x + 1000], dim=2)[:, :, 0] for x in (points, centroids)]
    expected = check_assign(points, centroids)
    for inputs in ([transposed[0], sliced[1]], [sliced[0], transposed[1]]):
        labels, distances = assign(*inputs, backend="triton")
        assert torch.equal(labels, expected[0])
        torch.testing.assert_close(distances, expected[1])


@on_triton
def test_kernels_ties_go_to_the_lowest_index(path: str) -> None:
    generator = torch.Generator().manual_seed(2)
    # Small whole numbers, 64 of them to a mean: sums are exact in every order, so that equal centroids tie wherever
    # the interpreter's matrix product rounds them differently.
    centroids = torch.randint(-1, 2, (64, 150), generator=generator).float().to(DEVICE)
    points = centroids[torch.tensor([3, 7, 30])].repeat(8, 1)
    for place in (5, 18, 33, 63):
        centroids[place] = centroids[3]
    centroids[40] = centroids[7]
    for place in (31, 32, 59):
        centroids[place] = centroids[30]
    labels = assign(points, centroids, backend="triton")[0]
    assert labels.tolist() == [3, 7, 30] * 8
    halfway = (centroids[:1] + centroids[1:2]) / 2
    assert assign(halfway, centroids[:2], backend="triton")[0].item() == 0
    assert assign(halfway, centroids[[1, 0]], backend="triton")[0].item() == 0


@on_triton
@pytest.mark.parametrize("bits", [23, 10, 7], ids=["float32", "tf32", "bfloat16"])
def test_kernels_a_large_common_offset_takes_no_digits(
    bits: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the shift float32 already mislabels these points."""
    points, centroids = (x.float() + 4096.0 for x in clustered_on_device(60, 20, 300, spread=1.0, offset=0.0))
    truth = squared_distances(points, centroids)
    unshifted = torch.addmm(centroids.square().sum(1), points, centroids.t(), alpha=-2).argmin(1)
    assert not torch.equal(unshifted, truth.argmin(1))
    if bits < 23 and INTERPRETED:
        round_dots(monkeypatch, bits)
    elif bits == 10:
        monkeypatch.setattr(shared, "dot_precision", lambda: "tf32")
    elif bits == 7:
        pytest.skip("a GPU rounds float32 to tf32 at most")
    labels, distances = assign(points, centroids, backend="triton")
    assert torch.equal(labels, truth.argmin(1))
    torch.testing.assert_close(distances.double(), truth.amin(1), rtol=2.0 ** -min(bits, 17), atol=0)


@on_triton
def test_kernels_an_offset_of_bfloat16_points_does_not_meet_the_centroids_rounding(path: str) -> None:
    """Centroids are rounded after the shift, and what that takes is not multiplied with the offset."""
    generator = torch.Generator().manual_seed(0)
    points, centroids = (
        (96 + torch.randint(-4, 5, (rows, 300), generator=generator) / 2).bfloat16().to(DEVICE)
        for rows in (40, 13)
    )
    truth = squared_distances(points, centroids)
    _, distances = assign(points, centroids, backend="triton")
    torch.testing.assert_close(distances.double(), truth.amin(1), rtol=1e-3, atol=0)


@on_triton
def test_kernels_a_large_common_offset_of_three_tiles_of_centroids(tf32: None) -> None:
    points, centroids = (
        x.float() + 65536.0 for x in clustered_on_device(40, 300, 64, spread=0.5, offset=0.0)
    )
    truth = squared_distances(points, centroids)
    labels, distances = assign(points, centroids, backend="triton")
    assert torch.equal(labels, truth.argmin(1))
    torch.testing.assert_close(distances.double(), truth.amin(1), rtol=1e-2, atol=0)


@on_triton
def test_kernels_a_point_that_is_no_number_harms_no_other(path: str) -> None:
    points, centroids = (x.float() for x in clustered_on_device(40, 20, 66))
    expected = assign(points, centroids, backend="triton")
    points[3, 5], points[17] = float("nan"), float("inf")
    labels, distances = assign(points, centroids, backend="triton")
    assert labels[3] == 0
    assert distances[3].isnan()
    assert 0 <= labels[17] < 20
    assert not distances[17].isfinite()
    others = [i for i in range(40) if i not in (3, 17)]
    assert torch.equal(labels[others], expected[0][others])
    assert torch.equal(distances[others], expected[1][others])


@on_triton
def test_kernels_narrow_points_are_points_with_zeros(path: str) -> None:
    """The columns that are not there hold NaN in memory."""
    points, centroids = (x.float() for x in clustered_on_device(21, 20, 260))
    centroids[::3, 70:] *= 0.1
    for width in (0, 70):
        whole = torch.full((21, 260), float("nan"), device=DEVICE)
        whole[:, :width] = points[:, :width]
        padded = whole.nan_to_num(0.0)
        labels, distances = check_assign(whole[:, :width], centroids)
        alike = check_assign(padded, centroids)
        assert torch.equal(labels, alike[0])
        torch.testing.assert_close(distances, alike[1], rtol=1e-5, atol=0.1)


@on_triton
def test_kernels_equal_points_have_distance_zero(path: str) -> None:
    points = clustered_on_device(1, 1, 90)[0].float()
    labels, distances = assign(points.expand(20, 90), points.expand(3, 90), backend="triton")
    assert labels.tolist() == [0] * 20
    assert distances.min() >= 0
    assert distances.max() <= 1e-5


@on_triton
def test_kernels_every_tuned_configuration_is_right(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> None:
    """Tiles of another width must not change where parts of the features begin and end."""
    points, centroids = (x.float() for x in clustered_on_device(20, 5, 200))
    points = points[:, :170]
    for count in (1, 132):
        multiprocessors(count)
        config = kernels.assign_config(20, 5, 170, torch.float32, "ieee", kernels.target_of(points.device))
        by_width = {other.block_f: other for other in shared.neighbours(config, "block_f")}
        assert len(by_width) > 1
        for other in by_width.values():
            monkeypatch.setattr(kernels, "pick", lambda key, config, alternatives, run, chosen=other: chosen)
            check_assign(points, centroids)


def check_update(points: Tensor, labels: Tensor, sums: Tensor, counts: Tensor, rtol: float) -> None:
    """Added to what was there; clusters without points and columns beyond the points keep their bits."""
    clusters, width = sums.shape[0], points.shape[1]
    before, before_counts = sums.clone(), counts.clone()
    update_(sums, counts, points, labels, backend="triton")
    one_hot = torch.nn.functional.one_hot(labels, clusters).double()
    expected = before[:, :width].double() + one_hot.t() @ points.double()
    size = before[:, :width].double().abs() + one_hot.t() @ points.double().abs()
    assert sums.isfinite().all()
    assert ((sums[:, :width].double() - expected).abs() <= rtol * size).all()
    assert torch.equal(counts, before_counts + one_hot.sum(0).long())
    assert torch.equal(sums[:, width:], before[:, width:])
    empty = one_hot.sum(0) == 0
    assert torch.equal(sums[empty], before[empty])


def no_sums(clusters: int, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sums [K, F] and counts [K] of nothing."""
    sums = torch.zeros(clusters, features, dtype=dtype, device=DEVICE)
    return sums, torch.zeros(clusters, dtype=torch.int64, device=DEVICE)


@on_triton
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernels_update_adds_every_point_to_its_cluster(
    shape: tuple[int, int, int, int], dtype: torch.dtype, sum_dtype: torch.dtype
) -> None:
    rows, clusters, features, width = shape
    points = clustered_on_device(rows, clusters, features)[0].to(dtype)[:, :width]
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(clusters, (rows,), generator=generator).to(DEVICE)
    labels[labels == 2] = 0
    sums = framed(torch.randn(clusters, features, generator=generator, dtype=sum_dtype).to(DEVICE))
    counts = torch.randint(9, (clusters,), generator=generator).to(DEVICE)
    # A point is exact in float32 and float64; what is left is the rounding of the additions.
    check_update(framed(points), labels, sums, counts, 8 * EPSILON if sum_dtype == torch.float32 else 1e-15)


@on_triton
def test_kernels_update_of_many_points_and_wide_rows() -> None:
    points = clustered_on_device(130, 3, 2100)[0].float()
    labels = torch.cat([torch.full((120,), 1), torch.arange(10) % 3]).to(DEVICE)
    check_update(points, labels, *no_sums(5, 2100), 16 * EPSILON)


@on_triton
def test_kernels_update_reads_and_writes_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GRID", 3)  # K beyond what one launch takes
    points = clustered_on_device(40, 7, 66)[0].float().t().contiguous().t()
    labels = torch.stack([torch.arange(40) % 7, torch.full((40,), -1)], dim=1).to(DEVICE)[:, 0]
    sums = torch.zeros(66, 14, device=DEVICE).t()[::2]
    counts = torch.zeros(7, 2, dtype=torch.int64, device=DEVICE)[:, 1]
    check_update(points, labels, sums, counts, 8 * EPSILON)


@on_triton
@pytest.mark.interpreter_only
def test_kernels_labels_out_of_range_are_refused() -> None:
    """The public function reads the labels on a CPU; on a GPU this check runs on the device, which then is lost."""
    points = torch.ones(3, 8)
    for wrong in (-1, 4):
        with pytest.raises(RuntimeError, match=r"labels: expected values in \[0, 4\)"):
            kernels.update_(
                torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), points, torch.tensor([0, wrong, 3])
            )


@on_triton
def test_kernels_launched(
    monkeypatch: pytest.MonkeyPatch, tf32: None, multiprocessors: Callable[[int], None]
) -> None:
    launches = record_launches(monkeypatch)
    points, centroids = (x.float() for x in clustered_on_device(20, 5, 200))
    assign(points, centroids, backend="triton")
    assert launches == ["_kmeans_assign_kernel"]
    launches.clear()
    multiprocessors(132)
    labels = assign(points, centroids, backend="triton")[0]
    assert launches == ["_kmeans_assign_kernel", "_kmeans_nearest_kernel"]
    launches.clear()
    update(points, labels, 5, backend="triton")
    assert launches == ["_kmeans_update_kernel"]


@on_triton
@pytest.mark.interpreter_only
def test_kernels_nothing_is_read_or_written_outside(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_stray_accesses(monkeypatch)
    points, centroids = (x.float() for x in clustered_on_device(21, 21, 75))
    labels = check_assign(points[:, :70], centroids)[0]
    sums = torch.zeros(21, 75)
    update_(sums, torch.zeros(21, dtype=torch.int64), points[:, :70], labels, backend="triton")


@on_triton
def test_kernels_same_inputs_give_the_same_bits(path: str) -> None:
    points, centroids = (x.float() for x in clustered_on_device(50, 20, 130))
    results = []
    for _ in range(2):
        labels, distances = assign(points, centroids, backend="triton")
        results.append((labels, distances, *update(points, labels, 20, backend="triton")))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@on_triton
def test_kernels_nothing_to_do() -> None:
    labels, distances = assign(
        torch.empty(0, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE), backend="triton"
    )
    assert labels.shape == distances.shape == (0,)
    for points in (torch.empty(0, 5, device=DEVICE), torch.empty(3, 0, device=DEVICE)):
        sums, counts = (x.fill_(1) for x in no_sums(2, 5))
        labels = torch.zeros(points.shape[0], dtype=torch.int64, device=DEVICE)
        update_(sums, counts, points, labels, backend="triton")
        assert sums.tolist() == [[1.0] * 5] * 2
        assert counts.tolist() == [1 + points.shape[0], 1]


@on_triton
def test_kernels_float64_is_refused() -> None:
    points = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match=r"points: .*float16, bfloat16 or float32.*backend='eager'"):
        assign(points, points[:2].float(), backend="triton")
    with pytest.raises(TypeError, match=r"centroids: .*float16, bfloat16 or float32.*backend='eager'"):
        assign(points.float(), points[:2], backend="triton")
    with pytest.raises(TypeError, match=r"points: .*float16, bfloat16 or float32.*backend='eager'"):
        update(points, labels, 2, backend="triton")


@on_triton
def test_kernels_compiles_whole_and_is_registered_properly() -> None:
    points, centroids = (x.float() for x in clustered_on_device(20, 5, 30))

    def step(points: Tensor, centroids: Tensor) -> Tensor:
        labels, distances = assign(points, centroids, backend="triton")
        sums, counts = update(points, labels, 5, backend="triton")
        return sums.sum() + counts.sum() + distances.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points, centroids), step(points, centroids))
    ops = torch.ops.fsd_kernels
    torch.library.opcheck(ops.kmeans_assign.default, (points, centroids, "triton"))
    assert torch.equal(nearest(points, centroids, backend="triton"), assign(points, centroids)[0])
    labels = assign(points, centroids, backend="triton")[0]
    torch.library.opcheck(ops.kmeans_update_.default, (*no_sums(5, 30), points, labels, "triton"))


@on_triton
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    rows=st.integers(1, 40),
    clusters=st.integers(1, 40),
    features=st.integers(1, 100),
    missing=st.integers(0, 60),
    count=st.sampled_from([1, 132]),
    seed=st.integers(0, 99),
)
def test_kernels_a_step_of_lloyd_lowers_the_inertia(
    rows: int,
    clusters: int,
    features: int,
    missing: int,
    count: int,
    seed: int,
    multiprocessors: Callable[[int], None],
) -> None:
    """Assignment, update, assignment: both halves of Lloyd's step, whatever the shape."""
    multiprocessors(count)
    points, centroids = (x.float() for x in clustered_on_device(rows, clusters, features, seed=seed))
    points = points[:, : max(0, features - missing)]
    labels, distances = check_assign(points, centroids)
    sums, counts = no_sums(clusters, features, torch.float64)
    check_update(points, labels, sums, counts, 1e-15)
    assert int(counts.sum()) == rows
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids).float()
    after = squared_distances(points, moved).amin(1).sum()
    scatter = squared_distances(points, centroids.mean(0)[None]).sum()
    assert after <= distances.double().sum() + 1e-5 * scatter


# --- bad input -------------------------------------------------------------------------------------------------------


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
