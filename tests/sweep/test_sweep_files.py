"""The file of a sweep and its results: what is read, and what is refused."""

import dataclasses

import pytest

from fsd_fast.sweep.config import read_sweep
from fsd_fast.sweep.results import HEADER, Row, read_results, write_results

GOOD = """
tasks: [reviews, {task_name: rte, data_dir: glue, teacher: {learning_rate: 5e-5}}]
seeds: [0, 1]
data: {max_seq_length: 64}
runs:
  - method: [vkd, fsd_il]
  - {method: fsd_ilg, gamma_g: [1e-4, 1e-5], gamma_m: [0, 1]}
"""


def read(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_sweep(path)


def test_lists_stand_for_every_combination(tmp_path):
    sweep = read(tmp_path, GOOD)
    assert [(entry.name, entry.sections) for entry in sweep.tasks] == [
        ("reviews", {}),
        ("rte", {"teacher": {"learning_rate": "5e-5"}, "data": {"data_dir": "glue"}}),
    ]
    assert [entry.seeds for entry in sweep.tasks] == [(0, 1), (0, 1)]
    assert sweep.sections == {"data": {"max_seq_length": 64}}
    assert sweep.runs == (
        {"method": "vkd"},
        {"method": "fsd_il"},
        *(
            {"method": "fsd_ilg", "gamma_g": gamma_g, "gamma_m": gamma_m}
            for gamma_g in ("1e-4", "1e-5")
            for gamma_m in (0, 1)
        ),
    )


def test_a_task_may_have_seeds_of_its_own(tmp_path):
    sweep = read(tmp_path, GOOD.replace("task_name: rte,", "task_name: rte, seeds: [7, 8, 9],"))
    assert [entry.seeds for entry in sweep.tasks] == [(0, 1), (7, 8, 9)]
    assert "seeds" not in sweep.tasks[1].sections["data"]
    with pytest.raises(ValueError, match=r"tasks\[1\]: seeds: expected different entries, got 7 twice"):
        read(tmp_path, GOOD.replace("task_name: rte,", "task_name: rte, seeds: [7, 7],"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            GOOD.replace("seeds", "seed"),
            "unknown key 'seed'; expected tasks, seeds, data, teacher, cache, memory, distill",
        ),
        (GOOD.replace("seeds", "seed"), "did you mean seeds?"),
        (GOOD.replace("runs:", "run:"), "did you mean runs?"),
        (GOOD + "seeds: [1]\n", "line 8: the key 'seeds' occurs more than once"),
        (
            GOOD.replace("gamma_m: [0, 1]", "gamma_m: []"),
            "runs[1]: gamma_m: expected a value or a list of values",
        ),
        (GOOD.replace("[0, 1]\ndata", "[0, 0]\ndata"), "seeds: expected different entries, got 0 twice"),
        (
            GOOD.replace("[0, 1]\ndata", "[a]\ndata"),
            "seeds: expected whole numbers from 0 to 4294967295, got 'a'",
        ),
        (GOOD.replace("[0, 1]\ndata", "[true]\ndata"), "seeds: expected whole numbers"),
        (GOOD.replace("[0, 1]\ndata", "3\ndata"), "seeds: expected a list with at least one entry, got 3"),
        (GOOD.replace("[vkd, fsd_il]", "[vkd, vkd]"), "runs: expected different entries"),
        (
            GOOD.replace("task_name: rte", "task: rte"),
            "tasks[1]: task_name: expected the name of a task, got None",
        ),
        ("tasks: [reviews]\n", "runs: expected a list with at least one entry, got none"),
        ("tasks: [reviews]\nruns: [vkd]\n", "runs[0]: expected names with values, got 'vkd'"),
        ("- a\n- b\n", "expected names with values, got ['a', 'b']"),
        ("tasks: [a\n", "expected YAML, got line 2"),
        (
            "tasks: !!python/object/apply:os.system [ls]\n",
            "expected YAML, got line 1: could not determine a construct",
        ),
        (
            "tasks: [a]\nruns: [{" + ", ".join(f"{name}: [1, 2, 3, 4]" for name in "abcdefghijkl") + "}]",
            "at most 10,000 runs",
        ),
        (b"tasks: [\xff]", "expected UTF-8, got byte 0xff"),
        (b"#" * 2_000_000, "expected a YAML file of at most 1,048,576 bytes, got 2,000,000"),
        ("? [a, b]\n: c\n", "line 1: found unhashable key"),
        ("[" * 5000, "expected YAML"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "sweep.yaml"))
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none\.yaml: no such file; expected the YAML file of a sweep"
    ):
        read_sweep(tmp_path / "none.yaml")


# --- results ----------------------------------------------------------------------------------------------------

ROW = Row(
    task="rte",
    method="fsd_ilg",
    seed=3,
    train_samples=2490,
    score=0.1 + 0.2,
    heldout_score=None,
    agreement=0.75,
    kl=1e-17,
    seconds=61.25,
    settings={"distill": {"beta": 4.0, "text": 'a "quoted", comma\nand line'}},
    scores={"eval_accuracy": 0.3},
    record={"arguments": {}, "facts": {"student_layers": 3}},
    versions={"torch": "2.13.0"},
    run="rte-fsd_ilg-seed3-0123abcd",
)


def test_results_come_back_as_they_were(tmp_path):
    path = tmp_path / "results.csv"
    rows = [
        ROW,
        dataclasses.replace(ROW, heldout_score=0.5, agreement=None, kl=None, record={"a": "x" * 200_000}),
    ]
    write_results(path, rows)
    assert read_results(path) == rows
    assert path.read_text().splitlines()[0] == ",".join(HEADER)
    assert list(tmp_path.iterdir()) == [path]
    write_results(path, [])
    assert read_results(path) == []


def damaged(path, change):
    write_results(path, [ROW])
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace("task,method", "method,task", 1),
            "line 1: expected the header task,method,seed,",
        ),
        (lambda text: "", "line 1: expected the header"),
        (lambda text: text + "rte,vkd\n", "line 3: expected 14 fields, got 2"),
        (
            lambda text: text.replace("0.30000000000000004", "nan"),
            "score: expected a finite number, got 'nan'",
        ),
        (lambda text: text.replace("0.30000000000000004", ""), "score: expected a finite number, got ''"),
        (lambda text: text.replace(",3,", ",3.5,", 1), "seed: expected a finite number, got '3.5'"),
        (lambda text: text.replace('"{""torch', '"[""torch'), "versions: expected a JSON object"),
        (lambda text: text[:-40], "line 2: "),
    ],
)
def test_a_damaged_results_file_is_refused(tmp_path, change, words):
    path = tmp_path / "results.csv"
    damaged(path, change)
    with pytest.raises(ValueError) as caught:
        read_results(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line ")
    assert words in message
    assert len(message) < 600
