"""Every value of every flag: accepted and typed, or refused in one line that names it, before anything is done."""

import dataclasses
import json
import random
import re

import pytest
from transformers import TrainingArguments

from fsd_fast import cli
from fsd_fast.commands import demo, load_command, training_checks
from fsd_fast.commands.parsing import command_flags, parse
from fsd_fast.commands.training_flags import CHOICES, HONOURED, RANGES, REFUSED, REFUSED_BY, refusal_of
from fsd_fast.commands.values import FlagType, Range
from fsd_fast.training import checkpoints

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NEEDED = {
    "fetch": {},
    "env": {},
    "demo": {},
    "teacher": {"output_dir": "run", "use_cpu": True},
    "memory": {"output_dir": "run", "teacher_model_name_or_path": "teacher"},
    "cache": {"teacher_cache_dir": "cache", "teacher_model_name_or_path": "teacher"},
    "distill": {"output_dir": "run", "teacher_model_name_or_path": "teacher", "use_cpu": True},
    "evaluate": {"model_name_or_path": "teacher"},
    "predict": {"model_name_or_path": "teacher", "output_dir": "run"},
    "sweep": {"config_file": "sweep.yaml", "output_dir": "run"},
    "table": {"results_file": "results.csv"},
    "analyze": {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher"},
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands without their work, in an empty folder; yields the dataclasses that they were called with."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    calls = []

    def prepare(*groups):
        calls.append(groups)
        return dict

    for command in NEEDED:
        monkeypatch.setattr(load_command(command), "prepare", prepare)
    return calls


def words(values):
    """JSON values as flags."""
    found = []
    for name, value in values.items():
        found += [f"--{name}", json.dumps(value) if isinstance(value, bool | dict) else str(value)]
    return found


def said(capsys):
    """The one line on stderr, which is the last one."""
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    own = [line for line in lines if line.startswith("fsd-fast ")]
    assert len(own) == 1, lines
    assert lines[-1] == own[0]
    assert len(own[0]) < 700
    return own[0]


@pytest.fixture
def refused(commands, tmp_path, capsys):
    """Runs a command line that must be refused; returns what it says."""

    def check(command, arguments):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([command, *arguments]) == 2
        assert commands == []
        assert sorted(tmp_path.rglob("*")) == before
        line = said(capsys)
        assert line.startswith(f"fsd-fast {command}: error: ")
        return line.removeprefix(f"fsd-fast {command}: error: ")

    return check


BAD_JSON_VALUES = [
    ("distill", "bf16", '"false"', "expected true or false, got 'false'"),
    ("distill", "bf16", "0", "expected true or false, got 0"),
    ("distill", "bf16", "null", "expected true or false, got null"),
    ("distill", "copy_teacher", '"false"', "expected true or false, got 'false'"),
    ("distill", "overwrite_output_dir", '"false"', "expected true or false, got 'false'"),
    ("distill", "learning_rate", '"1e-3"', "expected a number, got '1e-3'"),
    ("distill", "learning_rate", "true", "expected a number, got true"),
    ("distill", "max_steps", '"6"', "expected a whole number, got '6'"),
    ("distill", "max_steps", "0", "expected -1 or at least 1, got 0"),
    ("distill", "max_steps", str(10**30), "expected a whole number of 64 bits"),
    ("distill", "max_train_samples", "true", "expected a whole number, got true"),
    ("distill", "task_name", "3", "expected text, got 3"),
    ("distill", "gamma_g", str(10**29), "expected at least 0 and at most 1000000, got 1e+29"),
    ("distill", "gamma_g", str(10**400), "expected a finite number"),
    ("distill", "gamma_i", "1e999", "expected a finite number"),
    ("distill", "temperature", "1e30", "expected at least 0.001 and at most 1000000, got 1e+30"),
    ("memory", "teacher_model_name_or_path", "null", "expected text, got null"),
    ("distill", "teacher_model_name_or_path", '"a\\u0000b"', "without NUL"),
    ("distill", "teacher_model_name_or_path", '"\\ud800"', "expected UTF-8 text"),
    ("distill", "output_dir", '""', "expected text, got ''"),
    ("distill", "output_dir", '["run"]', "expected text, got a list"),
    ("distill", "method", '"fsd_x"', "expected one of finetune, vkd, fsd_i"),
    ("distill", "eval_strategy", '"sometimes"', "expected one of no, steps, epoch"),
    ("distill", "optim", '"sdg"', "names, such as sgd, got 'sdg'"),
    ("distill", "report_to", "[1]", "expected text or a list of texts, got a list"),
    ("distill", "report_to", '["wandb"]', "wandb is not installed"),
    ("distill", "report_to", '"wandbb"', "expected all, none or one of"),
    ("distill", "accelerator_config", '{"even": true}', "expected keys of split_batches"),
    ("distill", "deepspeed", '"none.json"', "no such file"),
    ("distill", "lr_scheduler_kwargs", '"min_lr"', "expected a JSON object, got 'min_lr'"),
    ("distill", "seed", "4294967296", "expected at least 0 and at most 4294967295"),
    ("memory", "num_centroid", "1.5", "expected a whole number, got 1.5"),
    ("memory", "memory_refine", '"1"', "expected a whole number, got '1'"),
    ("memory", "memory_refine", "-1", "expected at least 0, got -1"),
    ("evaluate", "per_device_eval_batch_size", "0", "expected at least 1, got 0"),
    ("demo", "output_dir", "{}", "expected text, got an object"),
]


@pytest.mark.parametrize(("command", "key", "value", "words"), BAD_JSON_VALUES)
def test_values_of_a_json_file_are_checked(refused, tmp_path, command, key, value, words):
    others = {name: entry for name, entry in NEEDED[command].items() if name != key}
    text = json.dumps(others)[:-1] + (", " if others else "") + f'"{key}": {value}}}'
    (tmp_path / "run.json").write_text(text)
    message = refused(command, ["run.json"])
    assert message.startswith(f"run.json: {key}: ") or (key == "deepspeed" and "--deepspeed" in message)
    assert words in message or key == "deepspeed"


@pytest.mark.parametrize(
    ("command", "flag", "value", "words"),
    [
        ("distill", "--bf16", "maybe", "expected true or false, got 'maybe'"),
        ("distill", "--gamma_i", "inf", "expected a finite number, got inf"),
        ("distill", "--gamma_i", "nan", "expected a finite number, got nan"),
        ("distill", "--beta", "four", "expected a number, got 'four'"),
        ("distill", "--max_steps", "1.5", "expected a whole number, got '1.5'"),
        ("distill", "--max_steps", "9" * 5000, "expected a whole number, got '999"),
        ("distill", "--per_device_train_batch_size", "0", "expected at least 1, got 0"),
        ("distill", "--model_name_or_path", "a\0b", "without NUL"),
        ("distill", "--lr_scheduler_kwargs", '{"a": ', "expected a JSON object"),
        ("memory", "--memory_refine", "-1", "expected at least 0, got -1"),
        ("memory", "--num_centroid", "1.5", "expected a whole number, got '1.5'"),
    ],
)
def test_values_of_the_command_line_are_checked(refused, command, flag, value, words):
    message = refused(command, [*cli_words(command), flag, value])
    assert message.startswith(f"{flag}: ")
    assert words in message


def cli_words(command):
    return words(NEEDED[command])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"seed": 1, "seed": 2}', "the key 'seed' occurs more than once"),
        (b'{"accelerator_config": {"a": 1, "a": 2}}', "the key 'a' occurs more than once"),
        (b'{"beta": NaN}', "NaN is not a JSON number"),
        (b'{"beta": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"beta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 32 deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "run.json: "),
        (b"{" + b" " * (16 << 20) + b"}", "of at most 16,777,216 bytes, got 16,777,218"),
        (b"\xff\xfe{}", "expected UTF-8, got byte 0xff"),
        (b"", "expected JSON, got line 1"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"beta": {"gamma": 1}}', "beta: expected a number, got an object"),
    ],
)
def test_damaged_json_files(refused, tmp_path, content, message):
    (tmp_path / "run.json").write_bytes(content)
    found = refused("distill", ["run.json", *cli_words("distill")])
    assert found.startswith("run.json: ")
    assert message in found


def test_a_folder_is_no_json_file(refused, tmp_path):
    (tmp_path / "run.json").mkdir()
    assert "run.json: expected a JSON file" in refused("distill", ["run.json"])


def test_a_text_that_says_false_deletes_nothing(refused, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    values = {**NEEDED["distill"], "overwrite_output_dir": "false"}
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert "overwrite_output_dir: expected true or false" in refused("distill", ["run.json"])
    assert checkpoint.is_dir()


def test_flags_and_json_give_the_same_values(commands, tmp_path):
    values = {
        **NEEDED["distill"],
        "beta": 2,
        "gamma_g": 1e-3,
        "max_steps": 6,
        "copy_teacher": True,
        "method": "fsd_il",
        "learning_rate": 1,
        "warmup_steps": 3,
        "logging_steps": 0.5,
        "max_train_samples": 7,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.25},
        "report_to": "none",
        "include_num_input_tokens_seen": "all",
        "dataloader_pin_memory": False,
        "debug": "underflow_overflow",
        "seed": 2**32 - 1,
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert cli.main(["distill", "run.json"]) == 0
    assert cli.main(["distill", *words(values)]) == 0
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in words(values)]
    assert cli.main(["distill", *hyphens]) == 0
    first, *others = commands
    assert others == [first, first]
    data, own, _, _, loss, run = first
    assert (loss.beta, own.copy_teacher, loss.method, data.max_train_samples) == (2.0, True, "fsd_il", 7)
    assert isinstance(loss.beta, float)
    assert (run.learning_rate, run.max_steps, run.report_to) == (1.0, 6, [])
    assert run.lr_scheduler_kwargs == {"num_cycles": 0.25}


def test_switches(commands):
    for given, expected in (
        (["--bf16"], True),
        (["--bf16", "yes"], True),
        (["--bf16=False"], False),
        ([], False),
    ):
        assert parse("teacher", ["--output_dir", "run", "--use_cpu", *given])[2].bf16 is expected
    assert parse("teacher", ["--output_dir", "run", "--use_cpu", "--no_dataloader_in_order"])[
        2
    ].dataloader_in_order is (False)


def test_several_reporters(commands, monkeypatch):
    monkeypatch.setattr(
        training_checks, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"]
    )
    run = parse("teacher", [*cli_words("teacher"), "--report_to", "tensorboard", "wandb"])[2]
    assert run.report_to == ["tensorboard", "wandb"]


def test_flags_behind_a_json_file_override_it(commands, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**NEEDED["distill"], "beta": 3, "alpha": 0.25}))
    assert cli.main(["distill", "run.json", "--beta", "2", "--output_dir", "other"]) == 0
    *_, loss, run = commands[0]
    assert (loss.beta, loss.alpha, run.output_dir) == (2.0, 0.25, "other")


def test_a_flag_that_overrides_is_named_as_a_flag(refused, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**NEEDED["distill"], "beta": 3}))
    assert refused("distill", ["run.json", "--beta", "x"]).startswith("--beta: expected a number")


def test_misspelt_names(refused, tmp_path):
    message = refused("distill", [*cli_words("distill"), "--learning-rat", "1", "--gama_i=1"])
    assert "--learning_rat 1 --gama_i=1" in message
    assert "did you mean --learning_rate, --gamma_i?" in message
    (tmp_path / "run.json").write_text(json.dumps({**NEEDED["distill"], "tempreture": 1}))
    assert "unknown keys tempreture; did you mean temperature?" in refused("distill", ["run.json"])
    assert "did you mean distill?" in str(refused_name("destill"))
    # A beginning is no name: a flag that comes later could take it.
    assert "--learning_ra 1; did you mean --learning_rate?" in refused(
        "distill", [*cli_words("distill"), "--learning_ra", "1"]
    )


def refused_name(command):
    with pytest.raises(ValueError, match="unknown command") as error:
        load_command(command)
    return error.value


def test_output_folders_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for command, name in (
        ("distill", "output_dir"),
        ("memory", "output_dir"),
        ("cache", "teacher_cache_dir"),
        ("evaluate", "output_dir"),
        ("demo", "output_dir"),
    ):
        flags = cli_words(command)
        assert f"{name}: {tmp_path / 'file'} is a file" in refused(command, [*flags, f"--{name}", "file/run"])
        assert "File name too long" in refused(command, [*flags, f"--{name}", "n" * 300])
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints.os, "access", lambda *_: False)
            message = refused(command, [*flags, f"--{name}", "new/run"])
            assert f": {tmp_path} is not writable" in message


def test_every_flag_of_trainer_is_honoured_or_refused():
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    assert fields.keys() == HONOURED.keys() | REFUSED.keys()
    assert not HONOURED.keys() & REFUSED.keys()
    assert all(HONOURED.values())
    for command, refusals in REFUSED_BY.items():
        assert refusals.keys() <= HONOURED.keys() | command_flags(command).keys()
    assert RANGES.keys() | CHOICES.keys() <= fields.keys()
    assert "does not know" in refusal_of("a_flag_of_the_future", "teacher").reason
    # What is accepted of a refused flag says what happens without it.
    for name, refusal in REFUSED.items():
        field = fields[name]
        default = (
            field.default_factory() if field.default is dataclasses.MISSING else (field.default or refusal[1])
        )
        assert refusal.accepted in (default, getattr(default, "value", default)), name


SAMPLES = {"bool": True, "int": 7, "float": 0.5, "text": "x", "list": ["x"], "object": {"x": 1}}


@pytest.mark.parametrize("command", ["teacher", "distill"])
def test_refused_flags_say_why(refused, commands, tmp_path, command):
    flags = command_flags(command)
    names = [name for name, flag in flags.items() if flag.refusal]
    assert {"do_predict", "do_train", "push_to_hub", "hub_token", "label_names", "fsdp"} <= set(names)
    assert ("label_smoothing_factor" in names) == (command == "distill")
    for name in names:
        flag = flags[name]
        value = SAMPLES[flag.values.kinds[0]] if flag.values.kinds else "x"
        value = not flag.refusal.accepted if isinstance(flag.refusal.accepted, bool) else value
        (tmp_path / "run.json").write_text(json.dumps({**NEEDED[command], name: value}))
        message = refused(command, ["run.json"])
        assert message.startswith(f"run.json: {name}: {flag.refusal.reason}; got ")
        (tmp_path / "run.json").write_text(json.dumps({**NEEDED[command], name: flag.refusal.accepted}))
        if flag.refusal.accepted is not None and name != "include_for_metrics":
            assert cli.main([command, "run.json"]) == 0
            commands.clear()


@pytest.mark.parametrize("command", sorted(NEEDED))
def test_defaults_are_values_that_are_accepted(command):
    for name, flag in command_flags(command).items():
        if flag.refusal or flag.required:
            continue
        default = flag.field.default
        if default is dataclasses.MISSING:
            default = flag.field.default_factory()
        default = getattr(default, "value", default)
        if default is not None or flag.values.optional:
            assert flag.values.check(default) == default, name


def test_the_demo_gives_flags_that_are_accepted(commands, tmp_path):
    stages = demo.stages(tmp_path / "demo").values()
    assert len(stages) == 6
    for command, flags in stages:
        assert cli.main([command, *flags]) == 0


def test_ranges():
    assert [number in Range(minimum=1, also=(-1,)) for number in (-2, -1, 0, 1)] == [False, True, False, True]
    assert [number in Range(above=0, below=1) for number in (0, 0.5, 1)] == [False, True, False]
    assert [number in Range(maximum=3) for number in (3, 4)] == [True, False]
    assert str(Range(minimum=1, also=(-1,))) == "-1 or at least 1"
    assert str(Range(above=0, maximum=0.5)) == "above 0 and at most 0.5"
    assert FlagType.of(str | list[str] | None).kinds == ("text", "list")
    assert FlagType.of(dict[str, int] | str | None).kinds == ("object", "text")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type, lr_scheduler_kwargs: "),
        (["--lr_scheduler_kwargs", '{"cycles": 3}'], "lr_scheduler_type, lr_scheduler_kwargs: "),
        (["--optim", "adamw_8bit"], "optim, optim_args: "),
        (["--optim", "galore_adamw"], "optim, optim_args: "),
        (["--fp16", "--bf16"], "fp16 and bf16"),
        (["--logging_steps", "1.5"], "--logging_steps must be an integer"),
        (["--load_best_model_at_end", "--eval_strategy", "no"], "--load_best_model_at_end"),
    ],
)
def test_what_trainer_would_find_late(refused, flags, message):
    assert message in refused("teacher", [*cli_words("teacher"), *flags])


TEXTS = (
    "", "true", "false", "0", "-1", "1", "1.5", "1e30", "inf", "nan", "none", "null", "-inf", "9" * 400, "x", "é", "[]",
    "{}", '{"a": NaN}', "{", "a\0b", "\udcff", "/", ".", "~", "run.json", "../..", "no", "steps", "\n", "-", "--",
    "n" * 300, "teacher/x", " ", "linear", "rte", "vkd", "tensorboard", "all",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2.5, 1e30, -1e-9, 10**30, 2**63, "1", "true", "", "x", "a\0b", [], ["x"], [1], {},
    {"a": {"b": [1]}}, "epoch", "n" * 300, "/dev/null/x", "\ud800", 1e308,
)  # fmt: skip


@pytest.mark.parametrize("command", ["teacher", "memory", "distill", "evaluate", "demo"])
def test_any_flags_end_well(commands, tmp_path, capsys, command):
    generator = random.Random(command)
    names = [*command_flags(command), "unknown_flag"]
    ended = {0: 0, 2: 0}
    for _ in range(300):
        values = dict(NEEDED[command])
        for name in generator.sample(names, generator.choice((1, 1, 2, 3))):
            values[name] = generator.choice(VALUES)
        arguments = []
        file = tmp_path / "run.json"
        if generator.random() < 0.5:
            file.write_text(json.dumps(values))
            arguments, values = ["run.json"], {**values}
        else:
            arguments, values = words(NEEDED[command]), {}
        for name in generator.sample(names, generator.choice((0, 1, 2))):
            text = generator.choice(TEXTS)
            values[name] = text
            arguments += [f"--{name}={text}"] if generator.random() < 0.5 else [f"--{name}", text]
        status = cli.main([command, *arguments])
        file.unlink(missing_ok=True)
        assert list(tmp_path.iterdir()) == [], arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        own = [line for line in captured.err.splitlines() if line.startswith("fsd-fast ")]
        ended[status] += 1
        if status == 0:
            assert own == []
            continue
        assert len(own) == 1, captured.err
        assert "Traceback" not in captured.err
        assert any(re.search(rf"\b{name}\b", own[0]) for name in values) or "unknown arguments" in own[0], (
            arguments,
            own,
        )
    assert min(ended.values()) > 5, ended


@pytest.mark.parametrize(
    ("command", "flag", "reason"),
    [
        ("memory", "max_eval_samples", "a memory is made of the training set alone"),
        ("cache", "max_eval_samples", "a cache is made of the training set alone"),
        ("evaluate", "max_train_samples", "the evaluation splits alone are scored"),
    ],
)
def test_samples_that_a_command_does_not_read_are_refused(refused, command, flag, reason):
    arguments = [word for name, value in NEEDED[command].items() for word in (f"--{name}", str(value))]
    assert f"--{flag}: {reason}; got 8" in refused(command, [*arguments, f"--{flag}", "8"])
