"""The measures of an analysis against formulas written anew, and the report."""

import html.parser
import re

import numpy as np
import pytest
import torch

from fsd_fast.analysis.layer_cka import LayerCKA, gram, matched_layers, mean_diagonal, unbiased_hsic
from fsd_fast.analysis.plots import draw_cka, draw_curves, draw_pairs, draw_planes
from fsd_fast.analysis.report import Section, html_report
from fsd_fast.analysis.restoration import Restoration, pairwise
from fsd_fast.analysis.states import chosen_samples, flat

PNG = b"\x89PNG\r\n\x1a\n"


def rows(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- CKA --------------------------------------------------------------------------------------------------------


def u_centred(matrix):
    """U-centering (Szekely and Rizzo, 2014): HSIC_1 is the inner product of U-centred matrices over n (n - 3)."""
    n = len(matrix)
    matrix = matrix - np.diag(np.diag(matrix))
    centred = (
        matrix
        - matrix.sum(0)[None, :] / (n - 2)
        - matrix.sum(1)[:, None] / (n - 2)
        + matrix.sum() / ((n - 1) * (n - 2))
    )
    return centred - np.diag(np.diag(centred))


@pytest.mark.parametrize("n", [4, 5, 12])
def test_hsic_is_the_product_of_u_centred_matrices(n):
    first = [rows(seed, n, 7) for seed in range(2)]
    second = [rows(seed, n, 3) + 5 for seed in range(10, 13)]
    found = unbiased_hsic(torch.stack([x @ x.T for x in first]), torch.stack([y @ y.T for y in second]))
    for p, x in enumerate(first):
        for q, y in enumerate(second):
            k, l_ = (u_centred((z @ z.T).numpy()) for z in (x, y))
            assert float(found[p, q]) == pytest.approx((k * l_).sum() / (n * (n - 3)), rel=1e-9)


def test_centring_changes_nothing():
    x, y = rows(0, 9, 6) + 100, rows(1, 9, 4) - 30
    raw = unbiased_hsic((x @ x.T)[None], (y @ y.T)[None])
    assert float(unbiased_hsic(gram(x)[None], gram(y)[None])) == pytest.approx(float(raw), rel=1e-6)


def test_hsic_has_no_bias():
    # Independent rows with far more features than samples: the biased CKA of a batch is near 1.
    cka = LayerCKA()
    biased = []
    for seed in range(40):
        x, y = rows(2 * seed, 16, 400), rows(2 * seed + 1, 16, 400)
        cka.add([x], [y])
        k, l_ = gram(x), gram(y)
        biased.append(float((k * l_).sum() / (k.norm() * l_.norm())))
    assert np.mean(biased) > 0.9
    assert abs(float(cka.matrix())) < 0.02


def test_cka_of_minibatches_is_the_quotient_of_sums():
    batches = [(rows(seed, 8, 5), rows(seed, 8, 5)[:, :3] + 0.5 * rows(seed + 50, 8, 3)) for seed in range(3)]
    cka = LayerCKA()
    for x, y in batches:
        cka.add([x], [y])
    sums = np.zeros(3)
    for x, y in batches:
        k, l_ = (u_centred((z @ z.T).numpy()) for z in (x, y))
        sums += [(k * l_).sum(), (k * k).sum(), (l_ * l_).sum()]
    assert float(cka.matrix()) == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), rel=1e-9)


def test_a_model_is_like_itself_whatever_its_rotation_and_scale():
    turn = torch.linalg.qr(rows(3, 6, 6))[0]
    x = rows(4, 10, 6)
    cka = LayerCKA()
    cka.add([x, rows(5, 10, 6)], [3 * x @ turn + 2, torch.ones(10, 6)])
    matrix = cka.matrix()
    assert float(matrix[0, 0]) == pytest.approx(1, rel=1e-9)
    assert abs(float(matrix[1, 0])) < 0.7
    assert matrix[:, 1].tolist() == [0, 0]  # constant features


def test_small_batches_are_left_out():
    cka = LayerCKA()
    cka.add([rows(0, 3, 5)], [rows(1, 3, 5)])
    with pytest.raises(ValueError, match="expected one of at least 4 samples, got none"):
        cka.matrix()
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        unbiased_hsic(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3))


def test_the_diagonal_spreads_the_student_over_the_teacher():
    assert matched_layers(12, 6) == [(0, 0), (2, 1), (4, 2), (6, 3), (8, 4), (10, 5), (12, 6)]
    assert matched_layers(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    matrix = torch.zeros(13, 7)
    for teacher, student in matched_layers(12, 6):
        matrix[teacher, student] = student
    assert mean_diagonal(matrix) == 3


# --- restoration ------------------------------------------------------------------------------------------------


def test_restoration_is_that_of_the_formula():
    teacher, student = rows(0, 2, 5, 4, 6)[0], rows(1, 2, 5, 4, 3)[0]  # [B, S, D]
    keep = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    restoration = Restoration()
    restoration.add(teacher.float(), student.float(), keep)
    found = restoration.figures()

    def structure(vectors):
        pairs = [(i, j) for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
        distance = np.array([np.linalg.norm(vectors[i] - vectors[j]) for i, j in pairs])
        norms = [np.linalg.norm(vector) for vector in vectors]
        cosine = np.array([vectors[i] @ vectors[j] / (norms[i] * norms[j]) for i, j in pairs])
        return distance, cosine

    def differences(groups):
        gathered = {"distance": [], "relative_distance": [], "cosine": []}
        for one, two in groups:
            (d_t, c_t), (d_s, c_s) = structure(one), structure(two)
            gathered["distance"].extend(abs(d_t - d_s))
            gathered["relative_distance"].extend(abs(d_t / d_t.mean() - d_s / d_s.mean()))
            gathered["cosine"].extend(abs(c_t - c_s))
        return {name: np.mean(values) for name, values in gathered.items()}

    masked = [
        (states * keep[:, :, None]).float().double().numpy().reshape(5, -1) for states in (teacher, student)
    ]
    within = [
        tuple(states[sample, keep[sample]].float().double().numpy() for states in (teacher, student))
        for sample in range(5)
    ]
    expected = {f"between_{name}": value for name, value in differences([masked]).items()}
    expected |= {f"within_{name}": value for name, value in differences(within).items()}
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_student_like_its_teacher_restores_everything():
    states, keep = rows(2, 4, 3, 5), torch.ones(4, 3).bool()
    restoration = Restoration()
    restoration.add(states, states.clone(), keep)
    assert set(restoration.figures().values()) == {0.0}
    # Scale is not structure: relative distances and cosines do not see it.
    scaled = Restoration()
    scaled.add(states, 3 * states, keep)
    found = scaled.figures()
    assert found["between_distance"] > 1
    for name in ("between_relative_distance", "between_cosine", "within_relative_distance", "within_cosine"):
        assert found[name] == pytest.approx(0, abs=1e-12)


def test_equal_and_zero_rows_are_defined():
    distance, cosine = pairwise(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    assert distance.tolist() == pytest.approx([0, 5**0.5, 5**0.5])
    assert cosine.tolist() == pytest.approx([1, 0, 0])
    assert [len(each) for each in pairwise(torch.ones(1, 3))] == [0, 0]


def test_padding_never_counts_whatever_it_holds():
    states = rows(3, 3, 4, 2)
    keep = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    clean = flat(states, keep)
    states[~keep] = float("nan")
    assert torch.equal(flat(states, keep), clean)
    restoration = Restoration()
    restoration.add(states, states, keep)
    assert set(restoration.figures().values()) == {0.0}


def test_samples_are_a_fair_choice():
    assert chosen_samples(5, 10, 0) != list(range(5))
    assert sorted(chosen_samples(5, 10, 0)) == list(range(5))
    assert len(set(chosen_samples(1000, 64, 1))) == 64


# --- plots and report -------------------------------------------------------------------------------------------


def test_every_plot_is_drawn(tmp_path):
    draw_cka(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)), tmp_path / "cka.png")
    pairs = [rows(seed, 40).abs() for seed in range(4)]
    draw_pairs(pairs, tmp_path / "pairs.png")
    labels = torch.tensor([0, 1] * 10)
    panels = {"teacher": (rows(0, 20, 8), rows(1, 3, 8)), "student": (rows(2, 20, 8), None)}
    draw_planes(panels, ("no", "yes"), labels, 0, tmp_path / "classes.png")
    draw_planes(panels, (), labels.float(), 0, tmp_path / "scores.png")
    history = [
        {"step": 1, "loss": 2.0, "loss_kd": 1.0},
        {"step": 1, "eval_accuracy": 0.5, "eval_loss": 0.7, "eval_runtime": 3.0},
        {"step": 2, "loss": -1.0, "train_runtime": 3.0},
    ]
    assert draw_curves(history, tmp_path / "curves.png")
    assert not draw_curves([{"step": 1, "train_runtime": 2.0}], tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cka.png",
        "classes.png",
        "curves.png",
        "pairs.png",
        "scores.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = "<script>alert(1)</script>\"' onload=x &amp; </style><img src=http://example.org/x>"


def test_a_report_escapes_every_text_and_loads_nothing(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(PNG)
    section = Section(
        HOSTILE, HOSTILE, image, [HOSTILE, "n", "m"], [[HOSTILE, HOSTILE, HOSTILE]], folded=True
    )
    page = html_report(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [section], HOSTILE)
    reader = _Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.tags.count("img") == 1
    sources = [value for name, value in reader.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "".join(reader.text).count(HOSTILE) >= 9
    assert not re.search(r"url\(|@import", page)
