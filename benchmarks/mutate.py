"""Break the Triton kernels on purpose and see whether the tests notice: ``python -m benchmarks mutate``.

Each mutation is one textual change to one kernel file, in a copy of the packages. The interpreter tests of that
kernel then run on the copy until one fails. A mutation that no test catches is a survivor. The command ends with 1 if
fewer than 95 % are caught, if a survivor has no explanation in the list, or if a mutation's text is gone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = 0.95


class Mutation(NamedTuple):
    """One change: the first ``old`` after ``where`` becomes ``new``."""

    op: str
    where: str
    old: str
    new: str
    what: str
    explanation: str = ""
    """Why no test can catch it, for a known survivor."""


MUTATIONS = (
    Mutation(
        "intra_cka",
        "def _load_rows",
        "kept[:, None] & (columns < width)[None, :]",
        "(columns < width)[None, :]",
        "row mask of loads dropped",
    ),
    Mutation(
        "intra_cka",
        "def _load_rows",
        "(columns < width)[None, :]",
        "(columns <= width)[None, :]",
        "< to <= at the width",
    ),
    Mutation("intra_cka", "def _load_rows", "* stride_xd", "", "stride of features dropped"),
    Mutation("intra_cka", "def _kept_rows", "kept = rows < S", "kept = rows <= S", "< to <= at S"),
    Mutation(
        "intra_cka",
        "def _kept_rows",
        "kept = kept & (flags != 0)",
        "kept = kept & (flags == flags)",
        "attention mask ignored",
    ),
    Mutation("intra_cka", "def _kept_rows", "* stride_mb", "* stride_ms", "mask's sample stride wrong"),
    Mutation(
        "intra_cka", "def _kept_rows", "* stride_ms, mask=kept", "* 1, mask=kept", "mask's row stride dropped"
    ),
    Mutation(
        "intra_cka",
        "def _kept_count",
        "count = tl.maximum(tl.sum(counts), 1)",
        "count = tl.maximum(S, 1)",
        "mean over padded rows (tiled)",
    ),
    Mutation(
        "intra_cka",
        "def _centred_gram",
        "squares += mean * mean",
        "squares += mean",
        "energy of the mean not squared",
    ),
    Mutation("intra_cka", "def _centred_gram", "x - mean[None, :]", "x", "not centred (fused)"),
    Mutation(
        "intra_cka",
        "def _centred_gram",
        "tl.where(kept[:, None], x - mean[None, :], 0.0)",
        "(x - mean[None, :])",
        "dropped rows centred too",
    ),
    Mutation(
        "intra_cka",
        "def _unit",
        "energy > count * mean_energy * ROUNDING",
        "energy >= 0.0",
        "constant rows taken for structure",
    ),
    Mutation(
        "intra_cka", "def _losses", "near = delta < 0.5", "near = delta < 5.0", "log1p used far from CKA = 1"
    ),
    Mutation(
        "intra_cka",
        "def _losses",
        "-tl.log(tl.maximum(product, CKA_FLOOR))",
        "-tl.log(product)",
        "floor under the logarithm dropped",
    ),
    Mutation("intra_cka", "def _losses", "small, -x,", "small, x,", "sign where 1 - delta rounds to 1"),
    Mutation(
        "intra_cka",
        "def _intra_cka_fwd_kernel",
        "count = tl.maximum(tl.sum(kept.to(tl.float32)), 1.0)",
        "count = tl.maximum(S, 1).to(tl.float32)",
        "mean over padded rows (fused)",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_fwd_kernel",
        "difference = unit_t - unit_s",
        "difference = unit_s - unit_t",
        "sign of G",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_fwd_kernel",
        "difference + delta * unit_s",
        "difference - delta * unit_s",
        "sign of the projection in G",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_fwd_kernel",
        "1.0 / (norm_s * energy_s)",
        "1.0 / norm_s",
        "trace not divided out of G",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_mean_kernel",
        "total / count",
        "total / S",
        "mean over padded rows (mean kernel)",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_tile_kernel",
        "part * part_d",
        "part * part_d + 1",
        "off by one in the split of D",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_tile_kernel",
        "first + part_d, width",
        "first + part_d + 1, width",
        "parts of D overlap",
    ),
    Mutation("intra_cka", "def _intra_cka_tile_kernel", "<= tile:", "< tile:", "tile index off by one"),
    Mutation(
        "intra_cka",
        "def _intra_cka_tile_kernel",
        "tl.where(kept_j[:, None], x_j - mean[None, :], 0.0)",
        "x_j",
        "second operand not centred",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_tile_kernel",
        "if tile == 0:",
        "if tile == 1:",
        "energy of the mean never stored",
    ),
    Mutation("intra_cka", "def _sum_parts", "range(0, splits)", "range(1, splits)", "first partial dropped"),
    Mutation(
        "intra_cka",
        "def _sum_parts",
        "columns[None, :] <= rows[:, None]",
        "columns[None, :] < rows[:, None]",
        "diagonal dropped from partials",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_finish_kernel",
        "1.0, 2.0)",
        "1.0, 1.0)",
        "entries below the diagonal counted once (norms)",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_finish_kernel",
        "tl.trans(g), mask=upper",
        "g, mask=upper",
        "mirror image not transposed",
    ),
    Mutation("intra_cka", "def _scaled", "scale > 0.0", "scale >= 0.0", "division by an empty row's scale"),
    Mutation(
        "intra_cka", "def _intra_cka_bwd_kernel", "scale *= 2.0 *", "scale *=", "factor 2 of the gradient"
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_bwd_kernel",
        "y - mean[None, :]",
        "y",
        "backward not centred",
        "rows of G sum to 0, so centring changes rounding alone; the outlier test bounds that",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_bwd_kernel",
        "mask=(rows < S)[:, None]",
        "mask=(kept)[:, None]",
        "gradient of dropped rows unwritten",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_bwd_tile_kernel",
        "* scale[:, None]",
        "",
        "scales of G's rows dropped (tiled)",
    ),
    Mutation(
        "intra_cka",
        "def _intra_cka_bwd_tile_kernel",
        "others[None, :], mask=inside",
        "rows[None, :], mask=inside",
        "wrong tile of G",
    ),
    Mutation(
        "gram",
        "def _load_tile",
        "(columns < features_width)",
        "(columns < memory_width)",
        "features read past their width",
    ),
    Mutation("gram", "def _load_tile", "samples >= 0", "samples > 0", "first sample dropped"),
    Mutation("gram", "def _load_tile", "samples < B", "samples <= B", "< to <= at B"),
    Mutation("gram", "def _load_tile", "(rows < K)[:, None]", "(rows <= K)[:, None]", "< to <= at K"),
    Mutation("gram", "def _load_tile", "* stride_hf", "", "features' column stride dropped"),
    Mutation(
        "gram",
        "def _load_tile",
        "inside = inside & _kept(",
        "inside = inside | _kept(",
        "mask's tokens joined, not met",
    ),
    Mutation("gram", "def _kept", "start // token", "start // token + 1", "token off by one"),
    Mutation(
        "gram",
        "def _kept",
        "(columns // token)[None, :] * stride_ks",
        "(columns // token)[None, :]",
        "mask's token stride dropped",
    ),
    Mutation("gram", "def _sums", "tl.where(from_memory, 0.0, x)", "x", "memory rows in the features' mean"),
    Mutation(
        "gram", "def _centre", "rows < head", "rows < K", "mean row of the memory gets the features' mean"
    ),
    Mutation("gram", "def _centre", "rows == N - 1", "rows == N", "features' mean row lost"),
    Mutation("gram", "def _store_lower", "<= rows[:, None]", "< rows[:, None]", "diagonal not stored"),
    Mutation(
        "gram",
        "def _all_tiles",
        "mean_h /= tl.maximum(B, 1)",
        "mean_h /= tl.maximum(K, 1)",
        "features' mean divided by K",
    ),
    Mutation(
        "gram",
        "def _tile_rows",
        "t * BLOCK +",
        "t * LAST +",
        "tiles start at multiples of the last one's rows",
    ),
    Mutation(
        "gram",
        "def _all_tiles",
        "t < MEMORY_TILES",
        "t < MEMORY_TILES - 1",
        "last tile of memory rows not read",
    ),
    Mutation(
        "gram",
        "def _all_tiles",
        "t >= FIRST_FEATURES",
        "t > FIRST_FEATURES",
        "first tile of features not read",
    ),
    Mutation("gram", "def _pairs", "for j in range(i + 1)", "for j in range(i)", "diagonal tiles dropped"),
    Mutation(
        "gram", "def _pairs", "range(first, tiles)", "range(first + 1, tiles)", "first row of tiles dropped"
    ),
    Mutation(
        "gram",
        "def _gram_fwd_kernel",
        "minimum(first + part_f,",
        "minimum(first + part_f + 1,",
        "parts of F overlap",
    ),
    Mutation(
        "gram",
        "def _gram_piece",
        "tl.trans(grams[p]), rows",
        "grams[p], rows",
        "tile not transposed when stored",
    ),
    Mutation(
        "gram",
        "def _gram_tile_kernel",
        "(block_i + 1) * BLOCK_N <= head",
        "block_i * BLOCK_N <= head",
        "tiles with features skipped as known",
    ),
    Mutation(
        "gram", "def _gram_sum_kernel", "range(0, parts)", "range(0, parts - 1)", "last partial dropped"
    ),
    Mutation(
        "gram",
        "def _gram_sum_kernel",
        "tl.trans(gram), mask=upper",
        "gram, mask=upper",
        "mirror image not transposed",
    ),
    Mutation(
        "gram", "def _symmetric_tile", "return straight + ", "return straight + 0 * ", "dGamma^T dropped"
    ),
    Mutation("gram", "def _gram_rows_kernel", "a -= tl.where", "a += tl.where", "sign of the mean in A"),
    Mutation(
        "gram", "def _gram_rows_kernel", "-tile, tile)", "tile, tile)", "row of the mean with the wrong sign"
    ),
    Mutation(
        "gram",
        "def _gram_bwd_kernel",
        "tl.dot(tiles_of_a[i * TILES + j]",
        "tl.dot(tiles_of_a[i * TILES]",
        "wrong tile of A",
    ),
    Mutation(
        "gram",
        "def _gram_bwd_kernel",
        "tl.program_id(0) * PANEL * BLOCK",
        "tl.program_id(0) * BLOCK",
        "panels of A overlap",
    ),
    Mutation(
        "gram",
        "def _gram_bwd_kernel",
        "LAST if PANEL == TILES else BLOCK",
        "LAST",
        "panels as short as the last tile",
    ),
    Mutation(
        "gram",
        "def _gram_bwd_kernel",
        "product * scales[i * TILES + j]",
        "product * scales[i * TILES]",
        "wrong scale of A",
    ),
    Mutation("gram", "def _load_scaled", "scale > 0.0", "scale >= 0.0", "division by an empty row's scale"),
    Mutation(
        "gram", "def _store_gradient", "tl.where(kept, d_z, 0.0)", "d_z", "gradient of dropped tokens not 0"
    ),
    Mutation(
        "structure",
        "def _trace",
        "index < rows",
        "index < rows - 1",
        "last diagonal entry dropped",
        "the trace cancels from value and gradient; it decides, by orders of magnitude, if there is structure",
    ),
    Mutation(
        "structure",
        "def _inverse_energy",
        "& (rows > 1)",
        "",
        "a single row taken for structure",
        "the energy of one centred row is 0 up to rounding, which the other condition rejects",
    ),
    Mutation("structure", "def _cka_of_block", "0.5 * tl.sum(deltas)", "tl.sum(deltas)", "half of delta"),
    Mutation("structure", "def _cka_of_block", "-1.0 / (floored", "1.0 / (floored", "sign of the gradient"),
    Mutation("structure", "def _distances", "- 2.0 * hm", "+ 2.0 * hm", "sign of the product in q"),
    Mutation("structure", "def _distances", "tl.maximum(q, 0.0)", "q", "distance not clamped"),
    Mutation(
        "structure", "def _distances", "/ double_ab, 1.0)", "/ double_ab, 0.0)", "cosine with the zero vector"
    ),
    Mutation(
        "structure",
        "def _pair_terms",
        "tl.where(positive, error",
        "tl.where(positive | True, error",
        "gradient at distance 0",
    ),
    Mutation("structure", "def _pair_terms", "r / b + own_cosine", "r / b - own_cosine", "sign in d/du"),
    Mutation(
        "structure",
        "def _structure_stats_kernel",
        "rows_e += tl.sum(d_q_e, axis=1)",
        "rows_e = tl.sum(d_q_e, axis=1)",
        "row sums keep the last block alone",
    ),
    Mutation(
        "structure",
        "def _scatter_tile",
        "whole_v, result)",
        "whole_u, result)",
        "wrong sum at the memory's mean",
    ),
    Mutation(
        "structure",
        "def _scatter_tile",
        ", whole_u, result)\n\n",
        ", whole_v, result)\n\n",
        "wrong sum between the means",
    ),
    Mutation(
        "structure",
        "def _structure_grad_kernel",
        "r < head + B",
        "r <= head + B",
        "mean row taken for a sample",
    ),
    Mutation(
        "structure", "def _structure_bwd_kernel", "range(0, 4)", "range(0, 3)", "fourth gradient dropped"
    ),
    Mutation(
        "kmeans",
        "def _load_points",
        "tl.minimum(rows, N - 1)",
        "tl.minimum(rows, N)",
        "a row past the last point read",
    ),
    Mutation(
        "kmeans",
        "def _load_points",
        "(columns < width)[None, :]",
        "(columns <= width)[None, :]",
        "< to <= at the points' width",
    ),
    Mutation("kmeans", "def _load_points", "* stride_xf", "", "stride of points dropped"),
    Mutation("kmeans", "def _load_tile", "(clusters < K)", "(clusters <= K)", "< to <= at K in loads"),
    Mutation("kmeans", "def _load_tile", "* stride_ck", "* stride_cf", "stride of centroids wrong"),
    Mutation("kmeans", "def _load_centroids", "mean *= inverse", "mean *= 1.0", "mean is a sum"),
    Mutation(
        "kmeans",
        "def _load_centroids",
        "mean += tl.sum(c_2, axis=0)",
        "mean += 0.0",
        "third tile not in the mean",
    ),
    Mutation(
        "kmeans",
        "def _add_product",
        "norms += _fold(c * c)",
        "norms += _fold(c)",
        "norms of centroids not squared",
    ),
    Mutation("kmeans", "def _add_product", "c -= mean[None, :]", "c -= 0.0", "centroids not shifted"),
    Mutation("kmeans", "def _add_beyond", "(c + mean[None, :])", "c", "zeros beyond the points not shifted"),
    Mutation(
        "kmeans", "def _nearer", "(clusters < K)[:, None] & ", "", "centroids past the last one compared"
    ),
    Mutation("kmeans", "def _nearer", "lower = lowest < best", "lower = lowest <= best", "< to <= on ties"),
    Mutation(
        "kmeans",
        "def _nearer",
        "return_indices_tie_break_left=True",
        "return_indices_tie_break_left=False",
        "ties within a tile broken to the right",
        "the interpreter takes the first of equal minima whatever it is told; compiled, False leaves the choice open",
    ),
    Mutation("kmeans", "def _finish", "- 2.0 * products", "+ 2.0 * products", "sign of the product"),
    Mutation(
        "kmeans",
        "def _finish",
        "tl.program_id(1).to(tl.int64) * K + first",
        "tl.program_id(1).to(tl.int64) * K",
        "tiles stored over each other",
    ),
    Mutation(
        "kmeans",
        "def _kmeans_assign_kernel",
        "last = tl.minimum(first + part_f, width)",
        "last = tl.minimum(first + part_f - BLOCK_F, width)",
        "last slice of a part dropped",
    ),
    Mutation("kmeans", "def _kmeans_assign_kernel", "x -= mean[None, :]", "x -= 0.0", "points not shifted"),
    Mutation(
        "kmeans",
        "beyond = tl.cdiv",
        "beyond += part * share",
        "beyond += share",
        "share of the first part twice",
    ),
    Mutation(
        "kmeans",
        "def _kmeans_assign_kernel",
        "_positive(square + best)",
        "_positive(best)",
        "distance without the point's own norm",
    ),
    Mutation(
        "kmeans", "def _kmeans_nearest_kernel", "range(0, parts)", "range(1, parts)", "partial scores dropped"
    ),
    Mutation(
        "kmeans",
        "best, label = _nearer(best, label, scores, clusters, K)\n    for",
        "range(0, parts)",
        "range(1, parts)",
        "partial norms dropped",
    ),
    Mutation(
        "kmeans",
        "def _kmeans_update_kernel",
        "places < last, other",
        "places <= last, other",
        "< to <= at a cluster's end",
    ),
    Mutation(
        "kmeans",
        "def _kmeans_update_kernel",
        "mask=(places < last)[:, None] & inside[None, :]",
        "mask=inside[None, :]",
        "points of the next cluster added",
    ),
    Mutation(
        "kmeans",
        "def _kmeans_update_kernel",
        "tl.load(pointers, mask=inside, other=0.0) + total",
        "total",
        "earlier sums dropped",
    ),
    Mutation("kmeans", "def _kmeans_update_kernel", "* stride_sf", "", "stride of sums dropped"),
    Mutation("kmeans", "def update_", "stable=True", "descending=True", "points in another order"),
)

LOSSES, KMEANS = "tests/test_triton_kernels.py", "tests/test_triton_kmeans.py"
TESTS = {
    "intra_cka": (LOSSES, "intra_cka"),
    "gram": (LOSSES, "gram and not programs"),
    "structure": (LOSSES, "structure"),
    "kmeans": (KMEANS, ""),
}
"""By op, the file of its tests and which of them."""


def mutated(mutation: Mutation, text: str) -> str | None:
    """The file with the change made; None if its text is not there."""
    start = text.find(mutation.where)
    at = text.find(mutation.old, start) if start >= 0 else -1
    return None if at < 0 else text[:at] + mutation.new + text[at + len(mutation.old) :]


def caught_by(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails on a mutated copy in ``folder``; None if none does, "" if the text is gone."""
    for name in ("kernels", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder / "pyproject.toml")
    path = folder / "kernels" / "fsd_kernels" / mutation.op / "triton.py"
    text = mutated(mutation, path.read_text())
    if text is None:
        return ""
    path.write_text(text)
    tests, selection = TESTS[mutation.op]
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", selection, tests
    ]  # fmt: skip
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "kernels"),
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return None
    return failed[0].split("::")[-1].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def main(argv: list[str]) -> int:
    """Print which test catches each mutation; 1 if too few are caught."""
    parser = argparse.ArgumentParser(prog="mutate", description=__doc__)
    parser.add_argument("--op", choices=list(TESTS), help="only this op's mutations")
    parser.add_argument("--first", type=int, help="only this many")
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if arguments.op in (None, m.op)][: arguments.first]
    caught, missing, unexplained = 0, 0, 0
    print("| op | change | caught by |\n|---|---|---|")
    for mutation in chosen:
        with tempfile.TemporaryDirectory() as folder:
            test = caught_by(mutation, Path(folder))
        caught += bool(test)
        missing += test == ""
        unexplained += test is None and not mutation.explanation
        verdict = test or (
            "TEXT NOT FOUND" if test == "" else f"survives: {mutation.explanation or 'UNEXPLAINED'}"
        )
        print(f"| {mutation.op} | {mutation.what} | {verdict} |", flush=True)
    print(f"{caught} of {len(chosen)} caught, {missing} not applicable, {unexplained} unexplained")
    return int(caught < NEEDED * len(chosen) or missing > 0 or unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
