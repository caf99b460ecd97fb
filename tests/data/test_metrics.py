"""GLUE metrics against hand values, scikit-learn and SciPy, and what happens at the edges."""

import json
import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from fsd_fast.data import TASKS, get_task
from fsd_fast.metrics import compute_metrics, fidelity

CLASSIFICATION = [name for name, task in TASKS.items() if not task.is_regression]
REGRESSION = [name for name, task in TASKS.items() if task.is_regression]


def logits_for(classes, num_labels):
    return np.eye(num_labels)[classes] * 2.0 - 1.0


def test_hand_values():
    # Predicted 1 1 0 0 1, true 1 0 0 1 1: TP 2, FP 1, FN 1, TN 1.
    logits, labels = logits_for([1, 1, 0, 0, 1], 2), [1, 0, 0, 1, 1]
    f1 = 2 * 2 / (2 * 2 + 1 + 1)
    assert compute_metrics(TASKS["sst2"], logits, labels) == {"accuracy": pytest.approx(0.6)}
    assert compute_metrics(TASKS["mrpc"], logits, labels) == {
        "accuracy": pytest.approx(0.6),
        "f1": pytest.approx(f1),
        "combined_score": pytest.approx((0.6 + f1) / 2),
    }
    matthews = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert compute_metrics(TASKS["cola"], logits, labels) == {"matthews_correlation": pytest.approx(matthews)}


def test_hand_values_of_a_regression():
    # Ranks 1 2 4 3 against 1 2 3 4: 1 - 6 * 2 / (4 * 15) = 0.8.
    result = compute_metrics(TASKS["stsb"], [[0.0], [1.0], [3.0], [2.0]], [0.0, 1.0, 2.0, 5.0])
    pearson = 5.0 / math.sqrt(5.0 * 14.0)
    assert result == {
        "pearson": pytest.approx(pearson),
        "spearmanr": pytest.approx(0.8),
        "combined_score": pytest.approx((pearson + 0.8) / 2),
    }


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_agrees_with_scikit_learn(name):
    task, rng = TASKS[name], np.random.default_rng(3)
    logits = rng.normal(size=(97, task.num_labels)).astype(np.float32)
    labels = rng.integers(task.num_labels, size=97)
    predicted = logits.argmax(axis=1)
    truth = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "matthews_correlation": sk.matthews_corrcoef(labels, predicted),
    }
    if task.num_labels == 2:
        truth["f1"] = sk.f1_score(labels, predicted)
    expected = {metric: pytest.approx(truth[metric]) for metric in task.metrics}
    if len(expected) > 1:
        expected["combined_score"] = pytest.approx(np.mean([truth[m] for m in task.metrics]))
    result = compute_metrics(task, logits, labels)
    assert result == expected
    json.dumps(result)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("shape", [(50,), (50, 1)])
def test_regression_agrees_with_scipy(name, shape):
    rng = np.random.default_rng(4)
    labels = rng.normal(size=50).astype(np.float32)
    scores = labels + rng.normal(size=50).astype(np.float32)
    pearson, spearman = stats.pearsonr(scores, labels)[0], stats.spearmanr(scores, labels)[0]
    result = compute_metrics(TASKS[name], scores.reshape(shape), labels)
    assert result == {
        "pearson": pytest.approx(pearson, rel=1e-5),
        "spearmanr": pytest.approx(spearman),
        "combined_score": pytest.approx((pearson + spearman) / 2, rel=1e-5),
    }


@pytest.mark.parametrize(
    ("scores", "labels"), [([2.0, 2.0, 2.0], [0.0, 1.0, 2.0]), ([0.0, 1.0], [3.0, 3.0]), ([1.0], [2.0])]
)
def test_correlation_with_a_constant_is_zero(scores, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute_metrics(TASKS["stsb"], scores, labels)
    assert result == {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}


def test_one_predicted_class_is_defined():
    logits = logits_for([0, 0, 0], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute_metrics(TASKS["mrpc"], logits, [0, 0, 0])["f1"] == 0.0
        assert compute_metrics(TASKS["cola"], logits, [0, 1, 0]) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["rte", "stsb"])
def test_predictions_that_are_not_finite_are_refused(name, bad):
    logits = np.zeros((4, TASKS[name].num_labels))
    logits[2, 0] = bad
    with pytest.raises(ValueError, match=rf"predictions of task '{name}' hold NaN"):
        compute_metrics(TASKS[name], logits, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("name", "shape", "labels", "message"),
    [
        ("rte", (2, 3), [0, 1], r"predictions has the shape \[2, 3\]; expected \[2, 2\]"),
        ("rte", (2,), [0, 1], r"expected \[2, 2\]"),
        ("stsb", (2, 2), [0, 1], r"expected \[2\]"),
        ("stsb", (3,), [0, 1], r"expected \[2\]"),
        ("rte", (0, 2), [], r"labels has the shape \[0\]; expected \[N\] with at least one"),
        ("rte", (2, 2), [0, -1], r"labels of task 'rte' are not all in 0\.\.1"),
        ("mnli", (2, 3), [0, 3], r"not all in 0\.\.2"),
    ],
)
def test_shapes_and_labels_are_checked(name, shape, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(TASKS[name], np.zeros(shape), labels)


# --- fidelity ----------------------------------------------------------------------------------------------------


def test_fidelity_of_classes_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 40, 3))
    found = fidelity(get_task("mnli"), student, teacher)
    divergences, agreed = [], 0
    for z_s, z_t in zip(student, teacher, strict=True):
        p_s, p_t = (np.exp(z) / np.exp(z).sum() for z in (z_s, z_t))
        divergences.append(sum(p_t[c] * np.log(p_t[c] / p_s[c]) for c in range(3)))
        agreed += int(z_s.argmax() == z_t.argmax())
    assert found.keys() == {"teacher_agreement", "teacher_kl"}
    assert found["teacher_kl"] == pytest.approx(np.mean(divergences), rel=1e-12)
    assert found["teacher_agreement"] == agreed / 40
    assert 0 < agreed < 40


def test_fidelity_of_a_student_that_is_its_teacher():
    logits = np.random.default_rng(1).normal(size=(10, 2)) * 300
    assert fidelity(get_task("rte"), logits, logits) == {"teacher_agreement": 1.0, "teacher_kl": 0.0}
    scores = logits[:, :1]
    found = fidelity(get_task("stsb"), scores, scores)
    assert found["teacher_agreement"] == pytest.approx(1)
    assert found["teacher_mse"] == 0


def test_fidelity_is_not_symmetric():
    confident, unsure = np.array([[9.0, 0.0]]), np.array([[0.1, 0.0]])
    task = get_task("rte")
    there, back = fidelity(task, confident, unsure), fidelity(task, unsure, confident)
    assert there["teacher_kl"] > 3 * back["teacher_kl"] > 0


def test_fidelity_of_a_regression():
    student, teacher = np.array([[1.0], [2.0], [4.0]]), np.array([3.0, 5.0, 9.0])
    found = fidelity(get_task("stsb"), student, teacher.reshape(3, 1))
    assert found == {"teacher_agreement": pytest.approx(1), "teacher_mse": pytest.approx((4 + 9 + 25) / 3)}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), r"got \[3, 2\] and \[4, 2\]"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "expected outputs of the same samples"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "NaN or infinite"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        fidelity(get_task("rte"), student, teacher)
