"""The changes that ``python -m benchmarks mutate`` makes to the Triton kernels, by op.

One table, longer than other files: a change in a kernel is looked up here by its op and function.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One change: the first ``old`` after ``where`` becomes ``new``."""

    where: str
    old: str
    new: str
    what: str
    explanation: str = ""
    """Why no test can catch it; empty where a test must."""


MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "intra_cka": (
        Mutation(
            "def _sample_of",
            "chosen = pair == i",
            "chosen = pair == i - 1",
            "layers taken for their neighbours",
        ),
        Mutation(
            "def _sample_of", "layers[i][1], stride_xb", "layers[0][1], stride_xb", "stride of another layer"
        ),
        Mutation("def _sample_of", "layers[i][4], width", "layers[0][4], width", "width of another layer"),
        Mutation(
            "def _load",
            "kept[:, None] & (columns < width)[None, :]",
            "(columns < width)[None, :]",
            "row mask of loads dropped",
        ),
        Mutation(
            "def _load", "(columns < width)[None, :]", "(columns <= width)[None, :]", "< to <= at the width"
        ),
        Mutation("def _load", "* stride_xd", "", "stride of features dropped"),
        Mutation("def _kept_rows", "kept = rows < S", "kept = rows <= S", "< to <= at S"),
        Mutation("def _kept_rows", "kept & (tl.load", "kept | (tl.load", "attention mask ignored"),
        Mutation("def _kept_rows", "* stride_mb", "* stride_ms", "mask's sample stride wrong"),
        Mutation(
            "def _kept_rows",
            "rows.to(tl.int64) * stride_ms",
            "rows.to(tl.int64)",
            "mask's row stride dropped",
        ),
        Mutation("def _kept_count", "count = tl.sum(counts)", "count = S", "mean over padded rows"),
        Mutation("def _kept_count", "first = tl.min(firsts)", "first = S", "nothing subtracted under a mask"),
        Mutation("def _shift", "/ tl.maximum", "* tl.maximum", "mean of the rows not divided"),
        Mutation(
            "def _operand",
            "tl.where(kept[:, None], x - shift[None, :], 0.0)",
            "(x - shift[None, :])",
            "dropped rows shifted too",
        ),
        Mutation("def _operand", "x - shift[None, :]", "x", "float32 features not shifted"),
        Mutation(
            "def _gram", "squares += shift * shift", "squares += shift * 0.0", "energy of the shift lost"
        ),
        Mutation(
            "def _centred", "- means[None, :] + mean", "- means[None, :]", "mean of the entries not added"
        ),
        Mutation("def _centred", "gram - means[:, None]", "gram", "columns centred alone"),
        Mutation(
            "def _centred",
            "tl.where(kept[:, None] & kept[None, :], centred, 0.0)",
            "centred",
            "dropped rows centred too (fused)",
        ),
        Mutation(
            "def _unit", "energy > offset_energy * ", "energy >= 0.0 * ", "constant rows taken for structure"
        ),
        Mutation("def _losses", "near = delta < 0.5", "near = delta < 5.0", "log1p used far from CKA = 1"),
        Mutation(
            "def _losses",
            "tl.where(product < CKA_FLOOR, CKA_FLOOR, product)",
            "product",
            "floor under the logarithm dropped",
        ),
        Mutation("def _losses", "small, -x,", "small, x,", "sign where 1 - delta rounds to 1"),
        Mutation(
            "def _intra_cka_fwd_kernel",
            "difference = unit_t - unit_s",
            "difference = unit_s - unit_t",
            "sign of G",
        ),
        Mutation(
            "def _intra_cka_fwd_kernel",
            "difference + delta * unit_s",
            "difference - delta * unit_s",
            "sign of the projection in G",
        ),
        Mutation(
            "def _intra_cka_fwd_kernel",
            "1.0 / (norm_s * energy_s)",
            "1.0 / norm_s",
            "trace not divided out of G",
        ),
        Mutation("def _intra_cka_tile_kernel", "<= tile:", "< tile:", "tile index off by one"),
        Mutation(
            "def _intra_cka_tile_kernel",
            "False, BLOCK_D",
            "True, BLOCK_D",
            "a tile's rows multiplied by themselves",
        ),
        Mutation(
            "def _intra_cka_tile_kernel", "if tile == 0:", "if tile == 1:", "energy of the shift never stored"
        ),
        Mutation(
            "def _intra_cka_tile_kernel",
            "tl.trans(gram), mask=upper",
            "gram, mask=upper",
            "mirror image not transposed (Gram)",
        ),
        Mutation(
            "def _intra_cka_mean_kernel",
            "tl.sum(total, axis=1) / count",
            "tl.sum(total, axis=1) / S",
            "mean over padded rows (tiled)",
        ),
        Mutation(
            "def _totals", "tl.sum(traces) - count * mean", "tl.sum(traces)", "trace not centred (tiled)"
        ),
        Mutation(
            "def _centred_tile",
            "- means_j[None, :] + mean",
            "- means_j[None, :]",
            "mean of the entries not added (tiled)",
        ),
        Mutation(
            "def _intra_cka_finish_kernel",
            "rows[:, None], 1.0, 2.0)",
            "rows[:, None], 1.0, 1.0)",
            "entries below the diagonal counted once",
        ),
        Mutation(
            "def _intra_cka_finish_kernel",
            "tl.trans(g), mask=upper",
            "g, mask=upper",
            "mirror image not transposed (G)",
        ),
        Mutation(
            "def _coefficient", "return 2.0 * coefficient", "return coefficient", "factor 2 of the gradient"
        ),
        Mutation(
            "def _coefficient", "neg_log >= FLOORED", "neg_log >= 1e9", "gradient on the floor of -log CKA"
        ),
        Mutation("def _coefficient", "strides[1][0]", "strides[0][0]", "stride of the other derivative"),
        Mutation("def _terms", "scale > 0.0", "scale >= 0.0", "division by an empty column's scale"),
        Mutation(
            "def _terms",
            "low = round_to(g - high.to(tl.float32), X_TYPE)",
            "low = round_to(g * 0.0, X_TYPE)",
            "second term of G lost",
        ),
        Mutation(
            "def _product",
            "product += tl.dot(tl.trans(y), low",
            "product += tl.dot(tl.trans(y), high",
            "first term of G twice",
        ),
        Mutation(
            "def _intra_cka_bwd_kernel",
            "g - (tl.sum(g, axis=0) / count)[None, :]",
            "g",
            "rows of G do not sum to 0",
        ),
        Mutation(
            "def _intra_cka_bwd_kernel",
            "stored = (rows < S)[:, None]",
            "stored = kept[:, None]",
            "gradient of dropped rows unwritten",
        ),
        Mutation(
            "def _intra_cka_bwd_kernel",
            "first = tl.program_id(1) * part_d",
            "first = tl.program_id(1) * part_d + 1",
            "off by one in the split of D",
        ),
        Mutation(
            "def _intra_cka_bwd_tile_kernel",
            "g - (sums / count)[None, :]",
            "g",
            "rows of G do not sum to 0 (tiled)",
        ),
        Mutation(
            "def _intra_cka_bwd_tile_kernel",
            "_product(y, high, low, scale,",
            "_product(y, high, low, scale * 0.0 + 1.0,",
            "scales of G dropped (tiled)",
        ),
        Mutation(
            "def _intra_cka_bwd_tile_kernel",
            "S + rows[None, :], mask=inside",
            "S + others[None, :], mask=inside",
            "wrong tile of G",
        ),
    ),
    "gram": (
        Mutation(
            "def _load_tile",
            "(columns < features_width)",
            "(columns < memory_width)",
            "features read past their width",
        ),
        Mutation("def _load_tile", "samples >= 0", "samples > 0", "first sample dropped"),
        Mutation("def _load_tile", "samples < B", "samples <= B", "< to <= at B"),
        Mutation("def _load_tile", "(rows < K)[:, None]", "(rows <= K)[:, None]", "< to <= at K"),
        Mutation("def _load_tile", "* stride_hf", "", "features' column stride dropped"),
        Mutation(
            "def _load_tile",
            "in_features = in_features & _kept(",
            "in_features = in_features | _kept(",
            "mask's tokens joined, not met",
        ),
        Mutation("def _kept", "start // token", "start // token + 1", "token off by one"),
        Mutation(
            "def _kept",
            "(columns // token)[None, :] * stride_ks",
            "(columns // token)[None, :]",
            "mask's token stride dropped",
        ),
        Mutation("def _sums", "tl.where(from_memory, 0.0, x)", "x", "memory rows in the features' mean"),
        Mutation("def _centre", "rows < head", "rows < K", "mean row of the memory gets the features' mean"),
        Mutation("def _centre", "rows == N - 1", "rows == N", "features' mean row lost"),
        Mutation("def _store_lower", "<= rows[:, None]", "< rows[:, None]", "diagonal not stored"),
        Mutation(
            "def _all_tiles",
            "mean_h /= tl.maximum(B, 1)",
            "mean_h /= tl.maximum(K, 1)",
            "features' mean divided by K",
        ),
        Mutation(
            "def _tile_rows", "t * BLOCK +", "t * LAST +", "tiles start at multiples of the last one's rows"
        ),
        Mutation(
            "def _all_tiles", "t < MEMORY_TILES", "t < MEMORY_TILES - 1", "last tile of memory rows not read"
        ),
        Mutation(
            "def _all_tiles", "t >= FIRST_FEATURES", "t > FIRST_FEATURES", "first tile of features not read"
        ),
        Mutation("def _pairs", "for j in range(i + 1)", "for j in range(i)", "diagonal tiles dropped"),
        Mutation(
            "def _pairs", "range(first, tiles)", "range(first + 1, tiles)", "first row of tiles dropped"
        ),
        Mutation(
            "def _gram_fwd_kernel",
            "minimum(first + part_f,",
            "minimum(first + part_f + 1,",
            "parts of F overlap",
        ),
        Mutation(
            "def _gram_fwd_kernel",
            "tl.trans(grams[p]), rows",
            "grams[p], rows",
            "tile not transposed when stored",
        ),
        Mutation(
            "def _gram_tile_kernel",
            "(block_i + 1) * BLOCK_N <= head",
            "block_i * BLOCK_N <= head",
            "tiles with features skipped as given",
        ),
        Mutation(
            "def _load_means",
            "mean_ptr + width + columns",
            "mean_ptr + columns",
            "the memory's mean for the features'",
        ),
        Mutation(
            "def _gram_bwd_tile_kernel",
            "range(0, N, INNER)",
            "range(INNER, N, INNER)",
            "first rows of Z left out",
        ),
        Mutation("def _gram_sum_kernel", "some < parts", "some < parts - 1", "last partial dropped"),
        Mutation(
            "def _gram_sum_kernel",
            "columns * N + rows, gram",
            "rows * N + columns, gram",
            "mirror image not transposed",
        ),
        Mutation("def _symmetric_tile", "return straight + ", "return straight + 0 * ", "dGamma^T dropped"),
        Mutation("def _gram_rows_kernel", "a -= tl.where", "a += tl.where", "sign of the mean in A"),
        Mutation(
            "def _gram_rows_kernel", "-tile, tile)", "tile, tile)", "row of the mean with the wrong sign"
        ),
        Mutation(
            "def _gram_bwd_kernel",
            "tl.dot(tiles_of_a[i * TILES + j]",
            "tl.dot(tiles_of_a[i * TILES]",
            "wrong tile of A",
        ),
        Mutation(
            "def _gram_bwd_kernel",
            "tl.program_id(0) * PANEL * BLOCK",
            "tl.program_id(0) * BLOCK",
            "panels of A overlap",
        ),
        Mutation(
            "def _gram_bwd_kernel",
            "LAST if PANEL == TILES else BLOCK",
            "LAST",
            "panels as short as the last tile",
        ),
        Mutation(
            "def _gram_bwd_kernel",
            "product * scales[i * TILES + j]",
            "product * scales[i * TILES]",
            "wrong scale of A",
        ),
        Mutation("def _load_scaled", "scale > 0.0", "scale >= 0.0", "division by an empty row's scale"),
        Mutation(
            "def _store_gradient", "tl.where(kept, d_z, 0.0)", "d_z", "gradient of dropped tokens not 0"
        ),
    ),
    "structure": (
        Mutation(
            "def _trace",
            "index < rows",
            "index < rows - 1",
            "last diagonal entry dropped",
            "the trace cancels from value and gradient; it decides, by orders of magnitude, if there is structure",
        ),
        Mutation(
            "def _inverse_energy",
            "& (rows > 1)",
            "",
            "a single row taken for structure",
            "the energy of one centred row is 0 up to rounding, which the other condition rejects",
        ),
        Mutation("def _cka_of_block", "0.5 * tl.sum(deltas)", "tl.sum(deltas)", "half of delta"),
        Mutation("def _cka_of_block", "-1.0 / (floored", "1.0 / (floored", "sign of the gradient"),
        Mutation("def _distances", "- 2.0 * hm", "+ 2.0 * hm", "sign of the product in q"),
        Mutation("def _without_rounding", "NORM_ROUNDING * sizes", "-sizes", "rounding taken for a norm"),
        Mutation("def _distances", "/ double_ab, 1.0)", "/ double_ab, 0.0)", "cosine with the zero vector"),
        Mutation(
            "def _pair_terms",
            "tl.where(apart, error",
            "tl.where(apart | True, error",
            "gradient at distance 0",
        ),
        Mutation("def _pair_terms", "r / b + cosine", "r / b - cosine", "sign in d/du"),
        Mutation(
            "def _structure_stats_kernel",
            "rows_e += tl.sum(d_q_e, axis=1)",
            "rows_e = tl.sum(d_q_e, axis=1)",
            "row sums keep the last block alone",
        ),
        Mutation(
            "def _scatter_tile", "whole_v, result)", "whole_u, result)", "wrong sum at the memory's mean"
        ),
        Mutation(
            "def _scatter_tile",
            ", whole_u, result)\n\n",
            ", whole_v, result)\n\n",
            "wrong sum between the means",
        ),
        Mutation(
            "def _structure_grad_kernel", "r < head + B", "r <= head + B", "mean row taken for a sample"
        ),
        Mutation("def _structure_bwd_kernel", "range(0, 4)", "range(0, 3)", "fourth gradient dropped"),
    ),
    "kmeans": (
        Mutation(
            "def _load_points",
            "tl.minimum(rows, N - 1)",
            "tl.minimum(rows, N)",
            "a row past the last point read",
        ),
        Mutation(
            "def _load_points",
            "(columns < width)[None, :]",
            "(columns <= width)[None, :]",
            "< to <= at the points' width",
        ),
        Mutation("def _load_points", "* stride_xf", "", "stride of points dropped"),
        Mutation("def _load_tile", "(clusters < K)", "(clusters <= K)", "< to <= at K in loads"),
        Mutation("def _load_tile", "* stride_ck", "* stride_cf", "stride of centroids wrong"),
        Mutation("def _load_centroids", "mean *= inverse", "mean *= 1.0", "mean is a sum"),
        Mutation(
            "def _load_centroids", "mean += tl.sum(c_2, axis=0)", "mean += 0.0", "third tile not in the mean"
        ),
        Mutation(
            "def _add_product", "norms += _fold(c * c)", "norms += _fold(c)", "norms of centroids not squared"
        ),
        Mutation("def _add_product", "c -= mean[None, :]", "c -= 0.0", "centroids not shifted"),
        Mutation("def _add_beyond", "(c + mean[None, :])", "c", "zeros beyond the points not shifted"),
        Mutation("def _nearer", "(clusters < K)[:, None] & ", "", "centroids past the last one compared"),
        Mutation("def _nearer", "lower = lowest < best", "lower = lowest <= best", "< to <= on ties"),
        Mutation(
            "def _nearer",
            "return_indices_tie_break_left=True",
            "return_indices_tie_break_left=False",
            "ties within a tile broken to the right",
            "the interpreter takes the first of equal minima whatever it is told; compiled, False leaves it open",
        ),
        Mutation("def _finish", "- 2.0 * products", "+ 2.0 * products", "sign of the product"),
        Mutation(
            "def _finish",
            "tl.program_id(1).to(tl.int64) * K + first",
            "tl.program_id(1).to(tl.int64) * K",
            "tiles stored over each other",
        ),
        Mutation(
            "def _kmeans_assign_kernel",
            "last = tl.minimum(first + part_f, width)",
            "last = tl.minimum(first + part_f - BLOCK_F, width)",
            "last slice of a part dropped",
        ),
        Mutation("def _kmeans_assign_kernel", "x -= mean[None, :]", "x -= 0.0", "points not shifted"),
        Mutation(
            "beyond = tl.cdiv", "beyond += part * share", "beyond += share", "share of the first part twice"
        ),
        Mutation(
            "def _kmeans_assign_kernel",
            "_positive(square + best)",
            "_positive(best)",
            "distance without the point's own norm",
        ),
        Mutation(
            "def _kmeans_nearest_kernel", "range(0, parts)", "range(1, parts)", "partial scores dropped"
        ),
        Mutation(
            "best, label = _nearer(best, label, scores, clusters, K)\n    for",
            "range(0, parts)",
            "range(1, parts)",
            "partial norms dropped",
        ),
        Mutation(
            "def _kmeans_update_kernel",
            "places < last, other",
            "places <= last, other",
            "< to <= at a cluster's end",
        ),
        Mutation(
            "def _kmeans_update_kernel",
            "mask=(places < last)[:, None] & inside[None, :]",
            "mask=inside[None, :]",
            "points of the next cluster added",
        ),
        Mutation(
            "def _kmeans_update_kernel",
            "tl.load(pointers, mask=inside, other=0.0) + total",
            "total",
            "earlier sums dropped",
        ),
        Mutation("def _kmeans_update_kernel", "* stride_sf", "", "stride of sums dropped"),
        Mutation("def update_", "stable=True", "descending=True", "points in another order"),
    ),
}
