"""``sweep``: what is shared, what is done again, and what is refused before anything runs."""

import json
import os

import pytest

from fsd_fast import cli
from fsd_fast.commands import run
from fsd_fast.commands.sweep import _Sweep
from fsd_fast.commands.sweep_plan import make_plan
from fsd_fast.files import exclusive_folder
from fsd_fast.sweep.config import read_sweep
from fsd_fast.sweep.results import read_results
from tests.tiny import ROOT, SEQUENCE, tiny

__all__ = ["tiny"]


def sweep_text(tiny, *, runs, teacher=None, seeds="[0]", more=""):
    teacher = teacher or f"{{model_name_or_path: {tiny.backbone}, max_steps: 20, learning_rate: 2e-3}}"
    return f"""
tasks:
  - {{task_name: rte, data_dir: {tiny.rte}}}
seeds: {seeds}
data: {{max_seq_length: {SEQUENCE}, heldout_samples: 4, subset_seed: 1}}
teacher: {teacher}
memory: {{num_centroid: 5}}
distill: {{student_layers: 2, max_steps: 3, learning_rate: 1e-3, model_name_or_path: {tiny.backbone}}}
runs:
{runs}
{more}"""


def write(path, text):
    path.write_text(text)
    return path


def sweep(path, folder, *more):
    return cli.main(["sweep", str(path), "--output_dir", str(folder), "--use_cpu", *more])


RUNS = """
  - {method: vkd}
  - {method: fsd_ilg, per_device_train_batch_size: [8, 1]}
"""


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """A sweep of three runs, of which the last one is refused: L_L compares the samples of a batch."""
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        path = write(folder / "sweep.yaml", sweep_text(tiny, runs=RUNS, more="cache: {}"))
        status = sweep(path, folder / "out", "--jobs", "2")
    return path, folder / "out", status


def test_a_failed_run_is_reported_and_the_others_have_rows(swept, capsys):
    path, folder, status = swept
    assert status == 1
    rows = read_results(folder / "results.csv")
    assert {(row.task, row.method, row.seed, row.train_samples) for row in rows} == {
        ("rte", "teacher", 42, 20),
        ("rte", "vkd", 0, 20),
        ("rte", "fsd_ilg", 0, 20),
    }
    (log,) = [path for path in (folder / "logs").iterdir() if "needs at least 2, got 1" in path.read_text()]
    assert log.name.startswith("rte-fsd_ilg-seed0-")
    before = (folder / "results.csv").read_bytes()
    (memory,) = (folder / "memories").glob("*/memory.json")
    built = memory.stat().st_mtime_ns
    # Again: nothing but the failed run.
    assert sweep(path, folder) == 1
    captured = capsys.readouterr()
    assert "sweep: 1 runs to do, 2 finished before" in captured.out
    assert f"[2/2] {log.stem}: failed: distill: per_device_train_batch_size: method 'fsd_ilg'" in captured.out
    assert "1 of 2 jobs failed" in captured.err
    assert (folder / "results.csv").read_bytes() == before
    assert memory.stat().st_mtime_ns == built


def test_runs_share_a_teacher_a_memory_and_its_logits(swept):
    _, folder, _ = swept
    assert len(list((folder / "teachers").iterdir())) == 1
    assert len(list((folder / "caches").iterdir())) == 1
    assert len(list((folder / "memories").iterdir())) == 1
    assert len(list((folder / "teacher_logits").iterdir())) == 2  # of the held-out rows, and of dev


def test_a_row_is_what_the_commands_give(swept, tiny, tmp_path):
    _, folder, _ = swept
    (row,) = [row for row in read_results(folder / "results.csv") if row.method == "fsd_ilg"]
    (flags,) = [path for path in (folder / "flags").iterdir() if path.stem == row.run]
    again = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "auto"]
    by_hand = run("distill", [str(flags), *again])
    assert row.scores["eval_validation_loss"] == by_hand["eval_validation_loss"]
    assert row.score == by_hand["eval_validation_accuracy"]
    assert row.heldout_score == by_hand["eval_heldout_accuracy"]
    (teacher,) = (folder / "teachers").iterdir()
    evaluated = run(
        "evaluate",
        [
            *(
                "--task_name",
                "rte",
                "--data_dir",
                str(tiny.rte),
                "--max_seq_length",
                str(SEQUENCE),
                "--use_cpu",
            ),
            *("--model_name_or_path", str(folder / "runs" / row.run)),
            *("--teacher_model_name_or_path", str(teacher)),
        ],
    )
    assert row.agreement == evaluated["eval_teacher_agreement"]
    assert row.kl == pytest.approx(evaluated["eval_teacher_kl"], rel=1e-6)
    assert row.settings["distill"]["learning_rate"] == 1e-3
    assert row.settings["teacher"]["model_name_or_path"] == str(tiny.backbone)
    assert row.settings["memory"] == {"num_centroid": 5}
    assert row.record["facts"]["student_layers"] == 2
    assert row.record["arguments"]["output_dir"] == f"runs/{row.run}"
    assert str(folder) not in json.dumps(row.record)
    assert "torch" in row.versions


def test_weights_are_removed_where_they_are_not_to_be_kept(swept, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    teacher = f"{{teacher_model_name_or_path: {tiny.teacher}}}"
    path = write(tmp_path / "sweep.yaml", sweep_text(tiny, runs="  - {method: finetune}", teacher=teacher))
    assert sweep(path, tmp_path / "out", "--keep_models", "false") == 0
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert (folder / "all_results.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    assert not (tmp_path / "out" / "teachers").exists()
    # A student that is trained without a teacher is compared with it all the same.
    (row,) = read_results(tmp_path / "out" / "results.csv")
    assert row.agreement is not None
    assert row.kl > 0


# --- refused before anything runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("learning_rate: 1e-3", "learning_rat: 1e-3"),
            "sweep.yaml: distill: unknown keys learning_rat; did you mean",
        ),
        (
            ("learning_rate: 1e-3", "learning_rate: fast"),
            "distill: learning_rate: expected a number, got 'fast'",
        ),
        (
            ("learning_rate: 1e-3", "output_dir: x"),
            "distill: output_dir: expected it to be left out: the sweep has",
        ),
        (
            ("learning_rate: 1e-3", "method: vkd"),
            "distill: method: expected it to be left out: methods are listed",
        ),
        (("learning_rate: 1e-3", "push_to_hub: true"), "distill: push_to_hub: nothing is uploaded"),
        (
            ("num_centroid: 5", "num_centroids: 5"),
            "memory: unknown keys num_centroids; did you mean num_centroid?",
        ),
        (("num_centroid: 5", "num_centroid: 0"), "memory: num_centroid: expected at least 1, got 0"),
        (("max_seq_length", "max_seq_len"), "data: unknown keys max_seq_len; did you mean max_seq_length?"),
        (("subset_seed: 1", "beta: 1"), "data: expected flags of the data, got beta"),
        (("method: vkd", "method: vdk"), "runs: method: expected one of"),
        (
            ("method: vkd", "method: vkd, seed: 1"),
            "runs: seed: expected it to be left out: seeds are listed under",
        ),
        (("method: vkd", "betta: 1"), "runs: unknown keys betta; did you mean beta?"),
        (("method: vkd", "task_name: rte"), "runs: task_name: expected it to be left out: tasks are listed"),
        (("task_name: rte", "task_name: rtee"), "unknown task 'rtee'"),
        (("max_steps: 20", "teacher_model_name_or_path: x"), "expected an existing teacher and nothing else"),
        (
            ("heldout_samples: 4", "heldout_samples: 24"),
            "heldout_samples: expected fewer than the 24 training rows",
        ),
        (("method: vkd", "per_device_train_batch_size: 8"), "expected different runs"),
    ],
)
def test_a_sweep_is_checked_as_a_whole(tiny, tmp_path, capsys, change, words):
    text = sweep_text(tiny, runs=RUNS)
    assert change[0] in text
    path = write(tmp_path / "sweep.yaml", text.replace(*change))
    assert sweep(path, tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fsd-fast sweep: error: ")
    assert words in message
    assert not (tmp_path / "out").exists()


def test_two_sweeps_in_one_folder_are_refused(tiny, tmp_path, capsys):
    path = write(tmp_path / "sweep.yaml", sweep_text(tiny, runs=RUNS))
    with exclusive_folder(tmp_path / "out", "output_dir"):
        assert sweep(path, tmp_path / "out") == 2
    assert "is being written by process" in capsys.readouterr().err


def test_results_of_another_kind_are_refused(tiny, tmp_path, capsys):
    path = write(tmp_path / "sweep.yaml", sweep_text(tiny, runs=RUNS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("task,score\nrte,1\n")
    assert sweep(path, tmp_path / "out") == 2
    assert "results.csv, line 1: expected the header task,method,seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--devices", "0"], "devices: expected none with --use_cpu true, got '0'"),
        (["--use_cpu", "false", "--devices", "a"], "devices: expected numbers of GPUs, as '0,1', got 'a'"),
        (["--use_cpu", "false", "--devices", "900"], "devices: expected numbers below the"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
    ],
)
def test_processes_that_cannot_be_started_are_refused(tiny, tmp_path, capsys, more, words):
    path = write(tmp_path / "sweep.yaml", sweep_text(tiny, runs=RUNS))
    assert sweep(path, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err


# --- the plan ---------------------------------------------------------------------------------------------------


def plan(tiny, tmp_path, text):
    return make_plan(read_sweep(write(tmp_path / "sweep.yaml", text)), tmp_path / "out", use_cpu=True)


def shared(found):
    return [*(teacher.job.name for teacher in found.teachers), *(job.name for job in found.shared)]


def test_the_same_settings_have_the_same_names(tiny, tmp_path):
    text = sweep_text(tiny, runs=RUNS, seeds="[0, 1]")
    one, two = (
        plan(tiny, tmp_path, text),
        plan(tiny, tmp_path, text.replace("seeds: [0, 1]", "seeds: [1, 2]")),
    )
    names = [{run.job.name for run in each.runs} for each in (one, two)]
    assert len(names[0] & names[1]) == 3
    assert shared(one) == shared(two)
    other = plan(tiny, tmp_path, text.replace("max_steps: 3", "max_steps: 4"))
    assert not {run.job.name for run in other.runs} & names[0]
    assert shared(other) == shared(one)
    # Seed by seed, so that a sweep that is cut off has compared what it could.
    assert [run.seed for run in one.runs] == [0, 0, 0, 1, 1, 1]


def test_a_subset_has_a_teacher_and_a_memory_of_its_own_unless_told_otherwise(tiny, tmp_path):
    runs = "  - {method: [vkd, fsd_g], max_train_samples: [8, 16]}"
    found = plan(tiny, tmp_path, sweep_text(tiny, runs=runs))
    assert [len(found.teachers), len(found.shared)] == [2, 2]
    teacher = f"{{model_name_or_path: {tiny.backbone}, max_train_samples: null}}"
    found = plan(tiny, tmp_path, sweep_text(tiny, runs=runs, teacher=teacher))
    assert [len(found.teachers), len(found.shared)] == [1, 2]
    assert found.teachers[0].job.flags["max_train_samples"] is None
    assert {job.flags["max_train_samples"] for job in found.shared} == {8, 16}
    by_method = {run.method: run for run in found.runs}
    assert len(by_method["vkd"].job.needs) == 1
    assert len(by_method["fsd_g"].job.needs) == 2
    assert "memory_path" not in by_method["vkd"].job.flags


def test_a_cache_is_shared_by_those_that_read_it(tiny, tmp_path):
    runs = "  - {method: [finetune, vkd, minilm, fsd_ilg]}"
    found = plan(tiny, tmp_path, sweep_text(tiny, runs=runs, more="cache: {teacher_cache_dtype: bfloat16}"))
    assert [job.command for job in found.shared] == ["cache", "memory"]
    cache, memory = found.shared
    readers = {run.method: run.job.flags for run in found.runs}
    for flags in (memory.flags, readers["vkd"], readers["fsd_ilg"]):
        assert flags["teacher_cache_dir"] == cache.flags["teacher_cache_dir"]
        assert flags["teacher_cache_dtype"] == "bfloat16"
    for method in ("finetune", "minilm"):
        assert "teacher_cache_dir" not in readers[method]
    assert cache.name in memory.needs
    without = plan(tiny, tmp_path, sweep_text(tiny, runs=runs))
    assert [job.command for job in without.shared] == ["memory"]
    # A rounded cache is a setting like another.
    assert not {run.job.name for run in found.runs if run.method == "vkd"} & {
        run.job.name for run in without.runs
    }


def test_tasks_are_done_one_after_the_other(tiny, tmp_path):
    """A sweep that is cut off has finished its first tasks; nothing shared is made long before it is needed."""
    text = sweep_text(tiny, runs=RUNS, seeds="[0, 1]")
    (line,) = [line for line in text.splitlines() if f"data_dir: {tiny.rte}" in line]
    second = line.replace(f"data_dir: {tiny.rte}", f"data_dir: {tiny.rte}, max_train_samples: 8, seeds: [5]")
    found = plan(tiny, tmp_path, text.replace(line, f"{line}\n{second}"))
    assert [run.seed for run in found.runs] == [0, 0, 0, 1, 1, 1, 5, 5, 5]
    folder = tmp_path / "out"
    lock = exclusive_folder(folder, "output_dir")
    with lock:
        jobs = _Sweep(found, {}, folder, [], [{}], lock, keep_models=True)._jobs()
    places = {job.name: place for place, job in enumerate(jobs)}
    assert all(places[need] < places[job.name] for job in jobs for need in job.needs)
    assert places[found.teachers[1].job.name] > places[found.runs[5].job.name]
    assert [job.name for job in jobs if job.payload["command"] == "distill"] == [
        run.job.name for run in found.runs
    ]


def test_a_task_may_have_settings_of_its_own(tiny, tmp_path):
    text = sweep_text(tiny, runs=RUNS).replace(
        f"data_dir: {tiny.rte}", f"data_dir: {tiny.rte}, distill: {{beta: 7}}"
    )
    assert {run.job.flags["beta"] for run in plan(tiny, tmp_path, text).runs} == {7.0}
