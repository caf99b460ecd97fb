"""The Triton kernels of k-means, run in Triton's interpreter, and on a GPU where there is one, in float64's light.

Where TRITON_INTERPRET is not set, this file holds one test, which runs all others in a process of their own; on a
GPU it holds the others too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsd_kernels.kmeans import assign, nearest, update, update_
from tests.interpreted import (
    DEVICE,
    INTERPRETED,
    RUNS_KERNELS,
    forbid_stray_accesses,
    framed,
    interpreter_only,
    on_gpu,
    poison_outputs,
    record_launches,
    round_dots,
    run_in_interpreter,
)

if RUNS_KERNELS:
    from fsd_kernels import _triton as shared
    from fsd_kernels.kmeans import triton as kernels

EPSILON = 2.0**-24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of multiprocessors that the heuristics see: many make them split the features."""

    def choose(count: int) -> None:
        target = shared.target_of(DEVICE)._replace(multiprocessors=count)
        monkeypatch.setattr(kernels, "target_of", lambda device: target)

    if RUNS_KERNELS:
        choose(1)
    return choose


@pytest.fixture(params=["whole", "split", "tiled", "split tiled"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> str:
    """Run a test on each way through the kernels; tiles of 16 centroids take few through those for many."""
    name = str(request.param)
    if "split" in name:
        multiprocessors(132)
    if "tiled" in name:
        monkeypatch.setattr(kernels, "_CENTROIDS", 16)
        monkeypatch.setattr(kernels, "_LAST", 16)
    return name


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let the heuristics choose as where tensor cores may multiply float32 (the interpreter does not)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def clustered(
    rows: int, clusters: int, features: int, seed: int = 0, spread: float = 0.5, offset: float = 40.0
) -> tuple[Tensor, Tensor]:
    """Points around centroids, with an offset that all share in every seventh feature."""
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(clusters, features, generator=generator, dtype=torch.float64)
    centroids[:, ::7] += offset
    owner = torch.randint(clusters, (rows,), generator=generator)
    points = centroids[owner] + spread * torch.randn(rows, features, generator=generator, dtype=torch.float64)
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


SHAPES = [
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_assign_is_the_nearest_centroid(shape: tuple[int, int, int, int], path: str) -> None:
    rows, clusters, features, width = shape
    points, centroids = clustered(rows, clusters, features)
    check_assign(framed(points.float()[:, :width]), framed(centroids.float()))


@pytest.mark.parametrize("shape", [(300, 100, 150, 120), (70, 300, 64, 64), (20, 400, 70, 40)], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_assign_with_tiles_of_full_size(
    shape: tuple[int, int, int, int], split: bool, tf32: None, multiprocessors: Callable[[int], None]
) -> None:
    multiprocessors(4 if split else 1)
    rows, clusters, features, width = shape
    points, centroids = clustered(rows, clusters, features)
    check_assign(framed(points.float()[:, :width]), framed(centroids.float()), on_gpu(2.0**-10, EPSILON))


@pytest.mark.parametrize(
    ("types", "rounding"),
    [
        # The interpreter multiplies bfloat16 in float32.
        ((torch.bfloat16, torch.bfloat16), on_gpu(2.0**-8, EPSILON)),
        ((torch.float16, torch.float16), 2.0**-11),
        ((torch.bfloat16, torch.float32), EPSILON),
        ((torch.float32, torch.float16), EPSILON),
    ],
    ids=str,
)
def test_assign_in_16_bits(types: tuple[torch.dtype, torch.dtype], rounding: float, path: str) -> None:
    points, centroids = clustered(40, 20, 96)
    check_assign(framed(points.to(types[0])), framed(centroids.to(types[1])), rounding)


def test_assign_reads_any_strides(path: str) -> None:
    points, centroids = (x.float() for x in clustered(40, 20, 66))
    transposed = [x.t().contiguous().t() for x in (points, centroids)]
    sliced = [torch.stack([x, x + 1000], dim=2)[:, :, 0] for x in (points, centroids)]
    expected = check_assign(points, centroids)
    for inputs in ([transposed[0], sliced[1]], [sliced[0], transposed[1]]):
        labels, distances = assign(*inputs, backend="triton")
        assert torch.equal(labels, expected[0])
        torch.testing.assert_close(distances, expected[1])


def test_ties_go_to_the_lowest_index(path: str) -> None:
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


@pytest.mark.parametrize("bits", [23, 10, 7], ids=["float32", "tf32", "bfloat16"])
def test_a_large_common_offset_takes_no_digits(bits: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shift float32 already mislabels these points."""
    points, centroids = (x.float() + 4096.0 for x in clustered(60, 20, 300, spread=1.0, offset=0.0))
    truth = squared_distances(points, centroids)
    unshifted = torch.addmm(centroids.square().sum(1), points, centroids.t(), alpha=-2).argmin(1)
    assert not torch.equal(unshifted, truth.argmin(1))
    if bits < 23 and INTERPRETED:
        round_dots(monkeypatch, bits)
    elif bits == 10:
        monkeypatch.setattr(kernels, "dot_precision", lambda: "tf32")
    elif bits == 7:
        pytest.skip("a GPU rounds float32 to tf32 at most")
    labels, distances = assign(points, centroids, backend="triton")
    assert torch.equal(labels, truth.argmin(1))
    torch.testing.assert_close(distances.double(), truth.amin(1), rtol=2.0 ** -min(bits, 17), atol=0)


def test_a_large_common_offset_of_three_tiles_of_centroids(tf32: None) -> None:
    points, centroids = (x.float() + 65536.0 for x in clustered(40, 300, 64, spread=0.5, offset=0.0))
    truth = squared_distances(points, centroids)
    labels, distances = assign(points, centroids, backend="triton")
    assert torch.equal(labels, truth.argmin(1))
    torch.testing.assert_close(distances.double(), truth.amin(1), rtol=1e-2, atol=0)


def test_a_point_that_is_no_number_harms_no_other(path: str) -> None:
    points, centroids = (x.float() for x in clustered(40, 20, 66))
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


def test_narrow_points_are_points_with_zeros(path: str) -> None:
    """The columns that are not there hold NaN in memory."""
    points, centroids = (x.float() for x in clustered(21, 20, 260))
    centroids[::3, 70:] *= 0.1
    for width in (0, 70):
        whole = torch.full((21, 260), float("nan"), device=DEVICE)
        whole[:, :width] = points[:, :width]
        padded = whole.nan_to_num(0.0)
        labels, distances = check_assign(whole[:, :width], centroids)
        alike = check_assign(padded, centroids)
        assert torch.equal(labels, alike[0])
        torch.testing.assert_close(distances, alike[1], rtol=1e-5, atol=0.1)


def test_equal_points_have_distance_zero(path: str) -> None:
    points = clustered(1, 1, 90)[0].float()
    labels, distances = assign(points.expand(20, 90), points.expand(3, 90), backend="triton")
    assert labels.tolist() == [0] * 20
    assert distances.min() >= 0
    assert distances.max() <= 1e-5


def test_every_tuned_configuration_is_right(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: Callable[[int], None]
) -> None:
    """Tiles of another width must not change where parts of the features begin and end."""
    points, centroids = (x.float() for x in clustered(20, 5, 200))
    points = points[:, :170]
    for count in (1, 132):
        multiprocessors(count)
        config = kernels.assign_config(20, 5, 170, torch.float32, "ieee", kernels.target_of(points.device))
        by_width = {other.block_f: other for other in shared.neighbours(config, "block_f")}
        assert len(by_width) > 1
        for other in by_width.values():
            monkeypatch.setattr(kernels, "pick", lambda key, configs, run, chosen=other: chosen)
            check_assign(points, centroids)


# -- update -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_adds_every_point_to_its_cluster(
    shape: tuple[int, int, int, int], dtype: torch.dtype, sum_dtype: torch.dtype
) -> None:
    rows, clusters, features, width = shape
    points = clustered(rows, clusters, features)[0].to(dtype)[:, :width]
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(clusters, (rows,), generator=generator).to(DEVICE)
    labels[labels == 2] = 0
    sums = framed(torch.randn(clusters, features, generator=generator, dtype=sum_dtype).to(DEVICE))
    counts = torch.randint(9, (clusters,), generator=generator).to(DEVICE)
    # A point is exact in float32 and float64; what is left is the rounding of the additions.
    check_update(framed(points), labels, sums, counts, 8 * EPSILON if sum_dtype == torch.float32 else 1e-15)


def test_update_of_many_points_and_wide_rows() -> None:
    points = clustered(130, 3, 2100)[0].float()
    labels = torch.cat([torch.full((120,), 1), torch.arange(10) % 3]).to(DEVICE)
    check_update(points, labels, *no_sums(5, 2100), 16 * EPSILON)


def test_update_reads_and_writes_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_GRID", 3)  # K beyond what one launch takes
    points = clustered(40, 7, 66)[0].float().t().contiguous().t()
    labels = torch.stack([torch.arange(40) % 7, torch.full((40,), -1)], dim=1).to(DEVICE)[:, 0]
    sums = torch.zeros(66, 14, device=DEVICE).t()[::2]
    counts = torch.zeros(7, 2, dtype=torch.int64, device=DEVICE)[:, 1]
    check_update(points, labels, sums, counts, 8 * EPSILON)


def test_running_sums_in_float64_are_exact() -> None:
    generator = torch.Generator().manual_seed(4)
    points = (torch.randn(240, 90, generator=generator) + 1e4).to(DEVICE)
    labels = torch.randint(5, (240,), generator=generator).to(DEVICE)
    sums, counts = no_sums(5, 90, torch.float64)
    for start in range(0, 240, 37):
        part = slice(start, start + 37)
        update_(sums, counts, points[part], labels[part], backend="triton")
    expected, expected_counts = update(points.double(), labels, 5, backend="reference")
    torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)
    assert torch.equal(counts, expected_counts)


@interpreter_only
def test_labels_out_of_range_are_refused() -> None:
    """The public function reads the labels on a CPU; on a GPU this check runs on the device, which then is lost."""
    points = torch.ones(3, 8)
    for wrong in (-1, 4):
        with pytest.raises(RuntimeError, match=r"labels: expected values in \[0, 4\)"):
            kernels.update_(
                torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), points, torch.tensor([0, wrong, 3])
            )


# -- what holds for both ------------------------------------------------------------------------------------------


def test_launches(
    monkeypatch: pytest.MonkeyPatch, tf32: None, multiprocessors: Callable[[int], None]
) -> None:
    launches = record_launches(monkeypatch)
    points, centroids = (x.float() for x in clustered(20, 5, 200))
    assign(points, centroids, backend="triton")
    assert launches == ["_kmeans_assign_kernel"]
    launches.clear()
    multiprocessors(132)
    labels = assign(points, centroids, backend="triton")[0]
    assert launches == ["_kmeans_assign_kernel", "_kmeans_nearest_kernel"]
    launches.clear()
    update(points, labels, 5, backend="triton")
    assert launches == ["_kmeans_update_kernel"]


@interpreter_only
def test_nothing_is_read_or_written_outside(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_stray_accesses(monkeypatch)
    points, centroids = (x.float() for x in clustered(21, 21, 75))
    labels = check_assign(points[:, :70], centroids)[0]
    sums = torch.zeros(21, 75)
    update_(sums, torch.zeros(21, dtype=torch.int64), points[:, :70], labels, backend="triton")


def test_same_inputs_give_the_same_bits(path: str) -> None:
    points, centroids = (x.float() for x in clustered(50, 20, 130))
    results = []
    for _ in range(2):
        labels, distances = assign(points, centroids, backend="triton")
        results.append((labels, distances, *update(points, labels, 20, backend="triton")))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_nothing_to_do() -> None:
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


def test_float64_is_refused() -> None:
    points = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(TypeError, match=r"points: .*float16, bfloat16 or float32.*backend='eager'"):
        assign(points, points[:2].float(), backend="triton")
    with pytest.raises(TypeError, match=r"centroids: .*float16, bfloat16 or float32.*backend='eager'"):
        assign(points.float(), points[:2], backend="triton")
    with pytest.raises(TypeError, match=r"points: .*float16, bfloat16 or float32.*backend='eager'"):
        update(points, labels, 2, backend="triton")


def test_compiles_whole_and_is_registered_properly() -> None:
    points, centroids = (x.float() for x in clustered(20, 5, 30))

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
def test_a_step_of_lloyd_lowers_the_inertia(
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
    points, centroids = (x.float() for x in clustered(rows, clusters, features, seed=seed))
    points = points[:, : max(0, features - missing)]
    labels, distances = check_assign(points, centroids)
    sums, counts = no_sums(clusters, features, torch.float64)
    check_update(points, labels, sums, counts, 1e-15)
    assert int(counts.sum()) == rows
    moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids).float()
    after = squared_distances(points, moved).amin(1).sum()
    scatter = squared_distances(points, centroids.mean(0)[None]).sum()
    assert after <= distances.double().sum() + 1e-5 * scatter


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_heuristics_fill_the_gpu_and_fit_it(name: str, precision: str) -> None:
    target = shared.TARGETS[name]
    for rows, clusters, width in (
        (4096, 100, 98304),
        (4096, 300, 98304),
        (32, 100, 98304),
        (393_000, 300, 1024),
    ):
        config = kernels.assign_config(rows, clusters, width, torch.float32, precision, target)
        programs = shared.cdiv(rows, config.block_n) * config.parts
        assert 2 * programs >= target.multiprocessors
        assert config.parts == 1 or programs <= 2 * target.multiprocessors
        # Accumulators leave a quarter of 65,536 registers to everything else.
        assert config.block_n * sum(config.blocks) <= 49_152
    few = kernels.assign_config(32, 300, 98304, torch.float32, precision, target)
    assert few.block_n == 32  # all rows: the centroids are read once
    many = kernels.assign_config(393_000, 300, 1024, torch.float32, precision, target)
    assert many.parts == 1  # nothing of the size of N x K in memory
    update = kernels.update_config(100, 98304, torch.float32, target)
    assert 100 * shared.cdiv(98304, update.block_f) >= target.multiprocessors


if not RUNS_KERNELS:
    for _name in [name for name in globals() if name.startswith("test_")]:
        del globals()[_name]

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        """Run everything above with TRITON_INTERPRET=1."""
        run_in_interpreter(__file__)
