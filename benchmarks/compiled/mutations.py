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
            "def _intra_cka_tile_kernel", "if tile == 0:", "if tile < 0:", "energy of the shift never stored"
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
        Mutation(
            "def _shifts",
            "tl.minimum(K, _SHIFTING)",
            "_SHIFTING",
            "mean of few rows divided by many",
            "any shift gives the same Gamma; this one is a shorter one, which saves fewer digits",
        ),
        Mutation(
            "def _tile(",
            "rows < head)[:, None], s_m[None, :], s_h",
            "rows < K)[:, None], s_m[None, :], s_m",
            "features shifted by the memory's mean",
        ),
        Mutation(
            "def _tile(",
            "(s_h - s_m)[None, :]",
            "s_h[None, :]",
            "row between the shifts without the memory's",
        ),
        Mutation("def _tile(", "rows == N - 1", "rows == N", "row of the features' shift lost"),
        Mutation("def _stored", "limit = N - 1 if RAW else N", "limit = N - 1", "last row not stored"),
        Mutation(
            "def _stored", "<= (rows // _SUMMED)", "< (rows // _SUMMED)", "tiles on the diagonal not stored"
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
            "def _gram_of_part",
            "tl.minimum(first + part_f,",
            "tl.minimum(first + part_f + 1,",
            "parts of F overlap",
        ),
        Mutation(
            "def _gram_of_part",
            "tl.trans(grams[p]), rows",
            "grams[p], rows",
            "tile not transposed when stored",
        ),
        Mutation(
            "def _gram_of_part", "block_i < FIRST", "block_i <= FIRST", "tiles with features skipped as given"
        ),
        Mutation(
            "def _gram_fwd_kernel",
            "program - parts, other_part_f",
            "program, other_part_f",
            "parts of the other side begin late",
        ),
        Mutation(
            "def _gram_fwd_kernel",
            "if program < parts",
            "if program <= parts",
            "first part of the other side of this one",
        ),
        Mutation("def _work", "2 * blocks * N", "blocks * N", "totals over the sums"),
        Mutation("def _gram_sum_kernel", "(some < count)", "(some < count - 1)", "last part dropped"),
        Mutation(
            "def _gram_sum_kernel",
            "(side * parts)",
            "(side * other_parts)",
            "other side's parts found elsewhere",
            "sides of equal width have as many parts",
        ),
        Mutation(
            "def _gram_sum_kernel",
            "raw_ptr + columns[None, :] * N + rows[:, None]",
            "raw_ptr + rows[:, None] * N + columns[None, :]",
            "mirror image not transposed",
        ),
        Mutation(
            "def _gram_sum_kernel", "times = 2.0", "times = 1.0", "tiles below the diagonal counted once"
        ),
        Mutation(
            "def _gram_sum_kernel",
            "tl.where(columns_h[None, :], total, 0.0)",
            "total",
            "memory's columns in the features' sums",
        ),
        Mutation(
            "def _gram_sum_kernel",
            "tl.where(rows_m[:, None], total, 0.0)",
            "total",
            "features' rows in the memory's sums",
        ),
        Mutation(
            "def _gram_sum_kernel",
            "tl.where(rows_h, of_rows_m, 0.0)",
            "of_rows_m",
            "memory's own sum between memory and features",
        ),
        Mutation(
            "def _signs",
            "tl.where(index == head - 1, 1.0, 0.0)",
            "0.0",
            "row of the memory's mean without it",
        ),
        Mutation(
            "def _signs", "tl.where(index == N - 1, 1.0, 0.0)", "0.0", "last row without the features' mean"
        ),
        Mutation(
            "def _signs",
            "((index == N - 1) & (head > 0))",
            "(index == N)",
            "last row without the memory's mean",
        ),
        Mutation("def _means_of_rows", "tl.maximum(B, 1)", "tl.maximum(K, 1)", "features' mean divided by K"),
        Mutation("def _gram_centre_kernel", "/ (k * b)", "/ (k * k)", "mean product divided by K^2"),
        Mutation(
            "def _gram_centre_kernel",
            "beta_r[:, None] * columns_h[None, :] + ",
            "",
            "features' mean not taken out of columns",
        ),
        Mutation(
            "def _gram_centre_kernel", "* mean_mh", "* 0.0", "mean products of memory and features dropped"
        ),
        Mutation(
            "def _gram_centre_kernel",
            "given_c.to(tl.float64) + mean_mm",
            "given_c.to(tl.float64)",
            "given rows without their mean",
        ),
        Mutation(
            "def _gram_centre_kernel",
            "tl.maximum(rows[:, None], columns[None, :])",
            "rows[:, None] + 0 * columns[None, :]",
            "given block's upper triangle read as it is",
            "the triangles of a symmetric block are equal",
        ),
        Mutation(
            "def _gram_centre_kernel",
            "tl.where(in_block, given.to(tl.float32), result)",
            "result",
            "given block not copied",
        ),
        Mutation(
            "def _gram_symmetric_kernel",
            "column * stride_dr + row * stride_dc",
            "row * stride_dr + column * stride_dc",
            "dGamma^T dropped",
        ),
        Mutation("def _gram_symmetric_kernel", "each * stride_dl", "0 * stride_dl", "first loss alone"),
        Mutation(
            "def _gram_symmetric_kernel",
            "d *= tl.load(weight_ptr + each)",
            "d *= tl.load(weight_ptr)",
            "first weight for all",
        ),
        Mutation("def _signed_sums", "(block < blocks)", "(block < 1)", "sums of the first block alone"),
        Mutation(
            "def _weights_of_means",
            "1.0 / tl.maximum(K, 1)",
            "1.0 / tl.maximum(B, 1)",
            "memory's mean divided by B",
        ),
        Mutation("def _gram_rows_kernel", "of_row_h * total_mh", "0.0", "product of the means dropped"),
        Mutation(
            "def _gram_rows_kernel",
            "row_h[:, None] * w_h[None, :]",
            "row_h[:, None] * w_m[None, :]",
            "features' sums at the memory's columns",
        ),
        Mutation(
            "def _gram_rows_kernel",
            "(of_row_m + of_row_h > 0.0)[:, None]",
            "(rows >= 0)[:, None]",
            "rows of the means kept",
            "their gradients are stored nowhere",
        ),
        Mutation(
            "def _gram_rows_kernel",
            "tl.where(scale == 0.0, 1.0, scale)",
            "scale",
            "division by an empty row's scale",
        ),
        Mutation("def _gram_rows_kernel", "(a - term.to(tl.float32))", "(a * 0.0)", "second term dropped"),
        Mutation("def _load_term", "columns < padded", "columns < padded - 16", "last columns of A dropped"),
        Mutation(
            "def _gram_bwd_kernel",
            "terms[i * TILES * TERMS + j]",
            "terms[i * TILES * TERMS]",
            "wrong tile of A",
        ),
        Mutation("def _gram_bwd_kernel", "product * scales[i]", "product", "scale of A dropped"),
        Mutation(
            "def _gram_bwd_kernel", "range(0, N, INNER)", "range(INNER, N, INNER)", "first rows of Z left out"
        ),
        Mutation(
            "def _gram_bwd_kernel", "(d_z + rest) * scale", "d_z * scale", "second term dropped, tile by tile"
        ),
        Mutation(
            "def _store_gradient", "tl.where(kept, d_z, 0.0)", "d_z", "gradient of dropped tokens not 0"
        ),
        Mutation(
            "def _store_gradient",
            "d_features_ptr + samples",
            "d_features_ptr + rows",
            "features' gradient at other rows",
        ),
    ),
    "structure": (
        Mutation(
            "def _store_sums",
            "times = tl.where(i == j, 1.0, 2.0)",
            "times = tl.where(i == j, 1.0, 1.0)",
            "tiles below the diagonal counted once",
        ),
        Mutation(
            "def _store_sums",
            "tl.where(diagonal, s, 0.0)",
            "s",
            "sum of all entries for the trace",
            "the trace decides, by orders of magnitude, if there is structure",
        ),
        Mutation("def _store_sums", "(column < rows)", "(column <= rows)", "mean's column in the sums"),
        Mutation(
            "def _unit",
            "& (rows > 1)",
            "",
            "a single row taken for structure",
            "the energy of one centred row is 0 up to rounding, which the other condition rejects",
        ),
        Mutation("def _cka_of_block", "tile < _tiles_of(rows)", "tile < 1", "sums of the first tile alone"),
        Mutation(
            "def _cka_of_block",
            "- tl.sum(st)) / product",
            "- tl.sum(st)) / norm_s",
            "1 - CKA not divided by |T|",
        ),
        Mutation("def _cka_of_block", "-unit_s / floored", "unit_s / floored", "sign of the gradient"),
        Mutation("def _distances", "- 2.0 * hm", "+ 2.0 * hm", "sign of the product in q"),
        Mutation("def _without_rounding", "sizes * NORM_ROUNDING", "-sizes", "rounding taken for a norm"),
        Mutation("def _distances", "/ double_ab, 0.0)", "/ double_ab, 1.0)", "cosine with the zero vector"),
        Mutation(
            "def _distances",
            "m_to_d + m_to_m)[None, :] + ",
            "m_to_d)[None, :] + ",
            "memory's mean left out of the inner product",
        ),
        Mutation(
            "def _distances",
            "tl.abs(cosine) > 0.5",
            "tl.abs(cosine) > 2.0",
            "distance of equal directions from their cosine",
        ),
        Mutation(
            "def _pair_terms",
            "tl.where(apart, error",
            "tl.where(apart | True, error",
            "gradient at distance 0",
        ),
        Mutation("def _pair_terms", "r / b + distance", "r / b - distance", "sign in d/du"),
        Mutation(
            "def _pair_terms",
            "teacher_cosine - cosine, distance",
            "cosine - teacher_cosine, distance",
            "sign of the error of wide angles",
        ),
        Mutation(
            "def _structure_stats_kernel",
            "tl.store(pointers + m_blocks * B, tl.sum(d_q_c",
            "tl.store(pointers, tl.sum(d_q_c",
            "sums of F^C over those of F^E",
        ),
        Mutation(
            "def _structure_stats_kernel", "% m_blocks", "% h_blocks", "blocks of pairs numbered wrongly"
        ),
        Mutation("def _sum_blocks", "(block < blocks)", "(block < 1)", "sums of the first block alone"),
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
        Mutation(
            "def _load_centroids",
            "columns, K, F)\n    c_1, c_2",
            "columns, K - 1, F)\n    c_1, c_2",
            "last centroid read as 0",
        ),
        Mutation(
            "def _add_product", "norms += _fold(c * c)", "norms += _fold(c)", "norms of centroids not squared"
        ),
        Mutation("def _add_product", "c -= mean[None, :]", "c -= 0.0", "centroids not shifted"),
        Mutation(
            "def _add_product", "2.0 * mean[None, :] * d", "mean[None, :] * d", "half of the mean's product"
        ),
        Mutation(
            "def _add_product",
            "* d.to(tl.float32)",
            "* c",
            "mean's product with centroids before they are rounded",
        ),
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
        Mutation("def _kmeans_assign_kernel", "- mean[None, :]\n", "- 0.0\n", "points not shifted"),
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
            "def _kmeans_nearest_kernel",
            "range(0, parts, loop",
            "range(1, parts, loop",
            "partial scores dropped",
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
