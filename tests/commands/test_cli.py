"""Bad input: a clear line, exit status 2, and nothing written. And what the command line itself promises."""

import json
import re
import shutil
import sys

import pytest
import torch

import fsd_fast
from fsd_fast import cli
from fsd_fast.commands import env
from fsd_fast.commands.distill import DistillRunArguments
from fsd_fast.commands.figures import figures_table
from fsd_fast.commands.launcher import split_launcher_rank
from fsd_fast.commands.parsing import command_flags, parse
from fsd_fast.data import builtin
from fsd_fast.training.trainer import FSDTrainer
from fsd_fast.versions import PACKAGES
from tests.tiny import (
    COMMON,
    ROOT,
    SEQUENCE,
    in_subprocess,
    memory_flags,
    save_backbone,
    save_tokenizer,
    tiny,
    without_source,
    write_rte,
    write_stsb,
)

__all__ = ["tiny"]

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command that must be refused; returns the one line that says why."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def check(command, arguments):
        before = files()
        assert cli.main([command, *arguments]) == 2
        assert files() == before, "something was written"
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        said = [line for line in lines if line.startswith("fsd-fast ")]
        assert len(said) == 1, captured.err
        assert said[0].startswith(f"fsd-fast {command}: error: ")
        assert "Traceback" not in captured.err
        # The message comes last: nothing that follows pushes it off the screen.
        assert lines[-1] == said[0]
        assert len(said[0]) < 700
        return said[0]

    return check


def test_unknown_command(refused):
    message = refused("destil", [])
    assert "unknown command 'destil'" in message
    assert all(name in message for name in cli.COMMANDS)


def test_no_command_prints_the_usage(capsys):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == out


def test_unknown_task(refused, tiny, tmp_path):
    for command, flags in (
        ("teacher", ["--model_name_or_path", str(tiny.backbone), "--output_dir", str(tmp_path / "run")]),
        ("memory", memory_flags(tiny, tmp_path / "run")),
        ("distill", tiny.distillation(tmp_path / "run", "vkd")),
        ("evaluate", ["--model_name_or_path", str(tiny.teacher), "--output_dir", str(tmp_path / "run")]),
    ):
        message = refused(command, [*flags, "--task_name", "snli"])
        assert "unknown task 'snli'" in message
        assert "rte" in message
        assert "reviews-score" in message


def test_unknown_method(refused, tiny, tmp_path):
    message = refused("distill", [*tiny.distillation(tmp_path / "run"), "--method", "fsd_x"])
    assert "--method" in message
    assert "'fsd_x'" in message
    assert "fsd_ilg" in message


def test_unknown_method_in_a_json_file(refused, tiny, tmp_path):
    values = {"output_dir": str(tmp_path / "run"), "teacher_model_name_or_path": str(tiny.teacher)}
    values |= {
        "model_name_or_path": str(tiny.backbone),
        "method": "fsd_x",
        "task_name": "rte",
        "use_cpu": True,
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    message = refused("distill", [str(path)])
    assert f"{path}: method: expected one of finetune, vkd, fsd_i" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"task_nam": "rte", "outputdir": "x"}', ("unknown keys outputdir, task_nam",)),
        ('{"task_name": ', ("expected JSON", "line 1")),
        ('["--task_name", "rte"]', ("expected a JSON object", "list")),
    ],
)
def test_bad_json(refused, tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_text(content)
    message = refused("teacher", [str(path)])
    assert str(path) in message
    for word in words:
        assert word in message


def test_missing_json(refused, tmp_path):
    assert "none.json" in refused("teacher", [str(tmp_path / "none.json")])


def test_unknown_flag(refused, tmp_path):
    message = refused("teacher", ["--output_dir", str(tmp_path / "run"), "--learning_rat_e", "3"])
    assert "--learning_rat_e 3" in message


def test_missing_flag(refused, tmp_path):
    assert "--teacher_model_name_or_path" in refused("distill", ["--output_dir", str(tmp_path / "run")])
    assert "--output_dir" in refused("teacher", [])


def test_missing_data_file(refused, tiny, tmp_path):
    folder = shutil.copytree(tiny.rte, tmp_path / "RTE")
    (folder / "dev.tsv").unlink()
    for command, flags in (
        ("distill", tiny.distillation(tmp_path / "run", "vkd")),
        ("memory", memory_flags(tiny, tmp_path / "run")),
    ):
        message = refused(command, [*flags, "--data_dir", str(folder)])
        assert f"{folder / 'dev.tsv'} not found" in message
    assert "is not a folder" in refused(command, [*flags, "--data_dir", str(tmp_path / "nowhere")])


def test_half_downloaded_file(refused, tiny, tmp_path):
    folder = shutil.copytree(tiny.rte, tmp_path / "RTE")
    path = folder / "train.tsv"
    content = path.read_text()
    path.write_text(content[: content.rindex("\tthe one was a two\t")])
    message = refused("distill", [*tiny.distillation(tmp_path / "run", "vkd"), "--data_dir", str(folder)])
    assert f"{path}, line 25" in message
    assert "found 2 columns, expected 4 (index, sentence1, sentence2, label)" in message
    assert "not completely downloaded" in message


def test_too_few_columns(refused, tiny, tmp_path):
    folder = shutil.copytree(tiny.rte, tmp_path / "RTE")
    path = folder / "train.tsv"
    path.write_text(path.read_text().replace("sentence2\t", "", 1))
    message = refused("distill", [*tiny.distillation(tmp_path / "run", "vkd"), "--data_dir", str(folder)])
    assert f"{path}, line 1" in message
    assert "sentence2" in message


def test_missing_model(refused, tiny, tmp_path):
    gone = str(tmp_path / "teacher")
    for command, flags in (
        ("teacher", [*tiny.data(), "--output_dir", str(tmp_path / "run"), "--model_name_or_path", gone]),
        ("memory", [*memory_flags(tiny, tmp_path / "run"), "--teacher_model_name_or_path", gone]),
        ("distill", [*tiny.distillation(tmp_path / "run", "vkd"), "--teacher_model_name_or_path", gone]),
        ("evaluate", [*tiny.data(), "--model_name_or_path", "./some/where/teacher"]),
    ):
        message = refused(command, flags)
        assert "no such folder" in message
        assert "teacher" in message


def test_a_student_needs_a_source(refused, tiny, tmp_path):
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / "fsd_arguments.json").unlink()
    flags = without_source(tiny.distillation(tmp_path / "run", "vkd"))
    message = refused("distill", [*flags, "--teacher_model_name_or_path", str(tmp_path / "teacher")])
    assert "model_name_or_path" in message
    assert "--copy_teacher true" in message


@pytest.mark.parametrize(("layers", "bound"), [("5", "4"), ("0", "1"), ("-1", "1")])
def test_student_layers_out_of_range(refused, tiny, tmp_path, layers, bound):
    message = refused("distill", [*tiny.distillation(tmp_path / "run", "vkd"), "--student_layers", layers])
    assert "layers" in message
    assert bound in message
    assert f"got {layers}" in message


@pytest.mark.parametrize("pairs", ["5:1", "3:1,x", "3-1", "3:3"])
def test_layer_pairs_that_do_not_exist(refused, tiny, tmp_path, pairs):
    message = refused("distill", [*tiny.distillation(tmp_path / "run", "fsd_i"), "--layer_pairs", pairs])
    assert "layer_pairs" in message


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [("--alpha", "1.5", "alpha"), ("--temperature", "0", "temperature"), ("--gamma_m", "-1", "gamma_m")],
)
def test_weights_out_of_range(refused, tiny, tmp_path, flag, value, name):
    message = refused("distill", [*tiny.distillation(tmp_path / "run"), flag, value])
    assert f"error: --{name}: expected" in message


@pytest.mark.parametrize("method", ["fsd_g", "fsd_ilg"])
def test_a_memory_is_needed(refused, tiny, tmp_path, method):
    flags = tiny.distillation(tmp_path / "run", method)
    at = flags.index("--memory_path")
    message = refused("distill", flags[:at] + flags[at + 2 :])
    assert "memory_path: methods fsd_g, fsd_ilg need a teacher memory" in message
    assert "'memory' command" in message


def test_a_memory_of_another_length_or_policy(refused, tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run", "fsd_g")
    message = refused("distill", [*flags, "--max_seq_length", "16"])
    assert f"max_seq_length is {SEQUENCE}, expected 16" in message
    assert "pad_features" not in message
    message = refused("distill", [*flags, "--pad_features", "include"])
    assert "pad_features is 'exclude', expected 'include'" in message


def test_a_memory_of_another_teacher(refused, tiny, tmp_path):
    teachers = tmp_path / "teachers"
    for name, sizes in (("deeper", {"layers": 5}), ("narrower", {"hidden": 16}), ("other", {"seed": 7})):
        save_backbone(teachers / name, labels=2, **sizes)
    for name, words in (
        ("deeper", ("layer is 3, expected 4", "teacher_fingerprint is ")),
        ("narrower", ("hidden_size is 32, expected 16",)),
        ("other", ("teacher_fingerprint is ",)),
    ):
        message = refused(
            "distill",
            [*tiny.distillation(tmp_path / "run"), "--teacher_model_name_or_path", str(teachers / name)],
        )
        assert "was built for another run" in message
        for word in words:
            assert word in message


def test_a_memory_that_is_missing_or_damaged(refused, tiny, tmp_path):
    flags = tiny.distillation(tmp_path / "run")
    assert "memory.safetensors: not found" in refused("distill", [*flags, "--memory_path", str(tmp_path)])
    folder = shutil.copytree(tiny.memory_exclude, tmp_path / "memory")
    content = (folder / "memory.safetensors").read_bytes()
    (folder / "memory.safetensors").write_bytes(content[: len(content) // 2])
    assert "damaged" in refused("distill", [*flags, "--memory_path", str(folder)])


def test_teacher_memory_of_another_width_cannot_start_the_students(refused, tiny, tmp_path):
    narrow = save_backbone(tmp_path / "narrow", hidden=16)
    flags = [*tiny.distillation(tmp_path / "run"), "--model_name_or_path", str(narrow)]
    message = refused("distill", [*flags, "--student_memory_init", "teacher"])
    assert "a student as wide as its teacher" in message


def test_number_of_centroids(refused, tiny, tmp_path):
    message = refused("memory", [*memory_flags(tiny, tmp_path / "run"), "--num_centroid", "25"])
    assert "num_centroid: expected at most the 24 training samples, got 25" in message
    message = refused("memory", [*memory_flags(tiny, tmp_path / "run"), "--num_centroid", "0"])
    assert "--num_centroid: expected at least 1, got 0" in message


def test_vocabularies_that_differ(refused, tiny, tmp_path):
    other = save_backbone(tmp_path / "other")
    save_tokenizer(other, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"])
    for name in ("tokenizer.json", "vocab.txt"):
        assert not (other / name).exists() or "twelve" not in (other / name).read_text()
    message = refused("distill", [*tiny.distillation(tmp_path / "run"), "--model_name_or_path", str(other)])
    assert "different vocabularies" in message
    assert str(other) in message


def test_teacher_with_another_number_of_labels(refused, tiny, tmp_path):
    data = write_stsb(tmp_path / "STS-B")
    task = ["--task_name", "stsb", "--data_dir", str(data)]
    for command, flags in (
        ("memory", memory_flags(tiny, tmp_path / "run")),
        ("distill", tiny.distillation(tmp_path / "run", "vkd")),
        (
            "evaluate",
            [*COMMON, "--model_name_or_path", str(tiny.teacher), "--output_dir", str(tmp_path / "run")],
        ),
    ):
        message = refused(command, [*flags, *task])
        assert f"{tiny.teacher} has 2 outputs; task 'stsb' needs 1" in message


@pytest.mark.parametrize("method", ["fsd_l", "fsd_il", "fsd_ilg"])
def test_batch_of_one_for_the_local_structure(refused, tiny, tmp_path, method):
    message = refused("distill", tiny.distillation(tmp_path / "run", method, batch=1))
    assert f"per_device_train_batch_size: method '{method}'" in message
    assert "at least 2, got 1" in message


@pytest.mark.parametrize("spelling", [["--deepspeed", "ds_config.json"], ["--deepspeed=ds_config.json"]])
@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_deepspeed_without_its_launcher(refused, tiny, tmp_path, command, spelling):
    flags = (
        tiny.distillation(tmp_path / "run")
        if command == "distill"
        else ["--output_dir", str(tmp_path / "run")]
    )
    message = refused(command, [*flags, *spelling])
    assert f"deepspeed --num_gpus N train_ds.py {command} --deepspeed ds_config.json" in message
    assert "DS_ACCELERATOR=cpu deepspeed --num_accelerators N train_ds.py" in message


def test_deepspeed_without_its_launcher_from_a_json_file(refused, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"deepspeed": "ds_config.json", "output_dir": str(tmp_path / "run")}))
    assert "deepspeed --num_gpus N train_ds.py teacher" in refused("teacher", [str(path)])


@pytest.mark.parametrize("command", ["teacher", "distill", "memory"])
def test_a_folder_that_holds_a_run(refused, tiny, tmp_path, command):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_results.json").write_text("{}")
    flags = {
        "teacher": [*tiny.data(), "--model_name_or_path", str(tiny.backbone), "--output_dir", str(folder)],
        "distill": tiny.distillation(folder, "vkd", steps=1),
        "memory": memory_flags(tiny, folder),
    }[command]
    message = refused(command, flags)
    assert f"output_dir: {folder} holds a run already" in message
    assert "--overwrite_output_dir true" in message


def test_a_folder_that_is_a_file(refused, tiny, tmp_path):
    (tmp_path / "run").write_text("")
    assert "is a file; expected a folder" in refused("distill", tiny.distillation(tmp_path / "run", "vkd"))


def test_a_folder_that_holds_a_run_from_a_json_file(refused, tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_results.json").write_text("{}")
    values = {"output_dir": str(folder), "use_cpu": True}
    for refusing in ({}, {"resume_from_checkpoint": False}, {"overwrite_output_dir": False}):
        (tmp_path / "run.json").write_text(json.dumps(values | refusing))
        assert "holds a run already" in refused("teacher", [str(tmp_path / "run.json")])


def test_overwriting_is_accepted(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_results.json").write_text("{}")
    flags = [*tiny.distillation(folder, "vkd", steps=1), "--overwrite_output_dir", "true"]
    assert cli.main(["distill", *flags]) == 0
    assert json.loads((folder / "all_results.json").read_text())["train_samples"] == 24
    memory = shutil.copytree(tiny.memory_exclude, tmp_path / "memory")
    (memory / "memory.json").write_text("{}")
    assert cli.main(["memory", *memory_flags(tiny, memory), "--overwrite_output_dir", "true"]) == 0
    assert json.loads((memory / "memory.json").read_text())["num_samples"] == 24


@pytest.mark.parametrize("named", ["last", "true", "FOLDER"])
def test_resuming_without_a_checkpoint(refused, tiny, tmp_path, named):
    folder = tmp_path / "run"
    (folder / "runs").mkdir(parents=True)
    named = str(tmp_path / "checkpoint-3") if named == "FOLDER" else named
    flags = [*tiny.distillation(folder, "vkd"), "--resume_from_checkpoint", named]
    message = refused("distill", flags)
    assert "resume_from_checkpoint" in message
    assert "checkpoint" in message.split("resume_from_checkpoint", 1)[1]


def test_several_gpus_in_one_process(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(DistillRunArguments, "n_gpu", 4)
    message = refused("distill", tiny.distillation(tmp_path / "run"))
    assert "sees 4" in message
    assert "deepspeed --num_gpus 4 train_ds.py distill" in message


def test_fetching_without_a_network(refused, monkeypatch):
    def fail():
        raise RuntimeError("pip could not download vaderSentiment")

    monkeypatch.setattr(builtin, "fetch", fail)
    assert "error: pip could not download vaderSentiment" in refused("fetch", [])


def test_figures_are_printed(tiny, capsys):
    flags = [*tiny.data(), "--model_name_or_path", str(tiny.teacher), "--use_cpu", "true"]
    assert cli.main(["evaluate", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "evaluation" in lines
    printed = dict(line.strip().rsplit("  ", 1) for line in lines if line.startswith("  "))
    printed = {name.strip(): value for name, value in printed.items()}
    assert 0 <= float(printed["accuracy"]) <= 1
    assert {"loss", "seconds", "samples per second"} <= printed.keys()


def test_a_command_that_is_done_leaves_the_process_group(tmp_path, monkeypatch):
    def work():
        init = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
        return {}

    monkeypatch.setattr(cli, "prepare", lambda command, arguments: work)
    assert cli.main(["evaluate"]) == 0
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_prints_the_figures(monkeypatch, capsys, rank):
    monkeypatch.setattr(cli, "prepare", lambda command, arguments: lambda: {"eval_accuracy": 0.5})
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["evaluate"]) == 0
    assert capsys.readouterr().out == ("evaluation\n  accuracy  0.5\n" if rank == "0" else "")


def test_version_and_usage_load_nothing():
    program = "\n".join(
        (
            "import sys, fsd_fast",
            "from fsd_fast import __version__",
            "from fsd_fast.cli import main",
            "assert [main(['--version']), main(['--help']), main([]), main(['destil'])] == [0, 0, 2, 2]",
            "print(sorted({'torch', 'transformers', 'numpy', 'deepspeed'} & set(sys.modules)), __version__)",
        )
    )
    lines = in_subprocess(["-c", program], PYTHONPATH=str(ROOT / "kernels")).splitlines()
    assert lines[-1] == f"[] {fsd_fast.__version__}"
    assert lines[0] == f"fsd-fast {fsd_fast.__version__}"


def test_what_the_package_gives_is_imported_when_it_is_used():
    assert set(fsd_fast.__all__) <= set(dir(fsd_fast))
    assert [getattr(fsd_fast, name).__name__ for name in fsd_fast.__all__] == fsd_fast.__all__
    assert fsd_fast.FSDTrainer is FSDTrainer
    assert not hasattr(fsd_fast, "nothing")


def test_env(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FSD_CACHE_DIR", raising=False)
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["torch"] == torch.__version__
    assert rows["fsd_fast"] == fsd_fast.__version__
    assert set(PACKAGES) | {"python", "C++ compiler", "ninja", "threads"} <= rows.keys()
    assert rows["cache folder"] == "~/.cache/fsd_fast"
    assert str(tmp_path) not in out
    if not torch.cuda.is_available():
        assert rows["gram"] == "eager: there is no GPU"
    monkeypatch.setenv("FSD_BACKEND", "reference")
    assert env.report()["backends"]["gram"] == "reference: FSD_BACKEND asks for it"
    monkeypatch.setenv("FSD_BACKEND", "triton")
    if not torch.cuda.is_available():
        assert env.report()["backends"]["kmeans"].startswith("none: kmeans: backend 'triton' was asked for")
    monkeypatch.setattr(env.shutil, "which", lambda name, path: None)
    assert env.report()["build tools"]["ninja"] == "not found"


def test_figures_are_grouped_and_named_for_people():
    figures = {
        "train_runtime": 61.51234567,
        "epoch": 2.0,
        "train_samples": 24000,
        "eval_validation_matched_f1": 0.25,
        "eval_validation_mismatched_f1": 0.5,
        "memory_inertia": 1.5e20,
        "total_flos": 0.0,
    }
    assert figures_table(figures).splitlines() == [
        "training",
        "  seconds                    61.5123",
        "  samples                    24,000",
        "run",
        "  epoch                      2",
        "  floating-point operations  0",
        "evaluation, matched",
        "  F1                         0.25",
        "evaluation, mismatched",
        "  F1                         0.5",
        "memory",
        "  inertia                    1.5e+20",
    ]
    assert figures_table({}) == ""


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_lists_the_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fsd-fast {command}")
    for name, flag in command_flags(command).items():
        assert bool(re.search(rf"--{name}\b", out)) == (flag.refusal is None), name


@pytest.mark.parametrize(
    "given", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
def test_both_spellings_of_the_rank(given):
    rest = ["distill", "--seed", "3"]
    assert split_launcher_rank([*given, *rest]) == rest
    assert split_launcher_rank([*rest, *given]) == rest
    assert split_launcher_rank(rest) == rest


def test_rank_before_the_command(monkeypatch):
    seen = []

    def prepared(command, arguments):
        seen.append((command, list(arguments)))
        return dict

    monkeypatch.setattr(cli, "prepare", prepared)
    monkeypatch.setattr(sys, "argv", ["train_ds.py", "--local_rank=1", "distill", "--seed", "3"])
    assert cli.main() == 0
    assert seen == [("distill", ["--seed", "3"])]


def test_defaults_are_the_papers(tmp_path):
    data, _, _, memory, loss, training = parse(
        "distill",
        ["--teacher_model_name_or_path", "t", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"],
    )
    assert (loss.alpha, loss.temperature, loss.beta, loss.gamma_i, loss.gamma_l) == (0.5, 10.0, 4.0, 1.0, 1.0)
    assert (loss.method, loss.intra_reduction, memory.student_memory_init) == (
        "fsd_ilg",
        "mean_log",
        "clusters",
    )
    assert (data.max_seq_length, training.per_device_train_batch_size) == (128, 32)
    assert not (tmp_path / "run").exists()


def test_data_of_the_training_set_alone_is_cut(tiny, tmp_path, refused):
    write_rte(tmp_path / "RTE")
    flags = [*tiny.distillation(tmp_path / "run", "vkd"), "--max_train_samples", "0"]
    assert "--max_train_samples: expected at least 1, got 0" in refused("distill", flags)


def test_a_process_of_several_ends_after_its_exit_handlers(capfd):
    program = (
        "import atexit\nfrom fsd_fast.distributed import end_process\n"
        "class Late:\n    def __del__(self): print('late', flush=True)\n"
        "late = Late()\natexit.register(print, 'handled')\nprint('done')\nend_process()\nprint('never')"
    )
    # Objects that live until the interpreter ends are not torn down: among them are the threads that abort it.
    assert in_subprocess(["-c", program]).split() == ["done", "handled"]
