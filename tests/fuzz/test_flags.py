"""Every flag of every command that trains, builds or scores, with values of all kinds: one line, status 2, no file.

The model that the commands are given does not exist, so a value that is accepted ends in that line.
"""

import contextlib
import io
import json
import os
import re

from fsd_fast.cli import main
from fsd_fast.commands.parsing import command_flags
from tests.fuzz.cases import ALL, fuzz, mutated
from tests.fuzz.isolated import isolated

BASE = {
    "teacher": {"model_name_or_path": "/no/such/model", "output_dir": "run"},
    "memory": {"teacher_model_name_or_path": "/no/such/model", "output_dir": "run"},
    "distill": {"teacher_model_name_or_path": "/no/such/model", "output_dir": "run"},
    "evaluate": {"model_name_or_path": "/no/such/model"},
}
NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "0.5",
    "-0.0",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    str(2**63),
    str(2**64),
    "1_0",
    "0x10",
]
TEXTS = [
    "",
    " ",
    "none",
    "None",
    "null",
    "true",
    "False",
    "maybe",
    "é",
    "\ud800",
    "a" * 5000,
    "-",
    "--",
    "---x",
    "[]",
    "{}",
]
TEXTS += [
    '{"a": 1}',
    '{"a":',
    "[1, 2]",
    '"x"',
    "../..",
    "/",
    "/dev/null",
    "/no/such/folder",
    "/proc/self",
    "$(touch stray)",
]
TEXTS += [
    "`touch stray`",
    "; touch stray",
    "%s%n",
    "{0}",
    "a\nb",
    "\t",
    "<img src=x>",
    "..",
    ".",
    "run.json",
    "auto",
    "last",
]
# Errors of these types say nothing to a user.
ESCAPE = re.compile(r"error: (\w+Error|\w+Exception|\w+Exit|AssertionError)\b")


def run_once(arguments, tmp_path):
    """Run a command line that must be refused; return its line."""
    for path in tmp_path.iterdir():
        raise AssertionError(f"a stray file before {arguments}: {path}")
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("fsd-fast ")]
    assert status == 2, (arguments, status, printed.getvalue()[-500:])
    assert len(lines) == 1, (arguments, printed.getvalue()[-500:])
    assert "Traceback" not in printed.getvalue(), arguments
    assert not ESCAPE.search(lines[0]), (arguments, lines[0])
    assert len(lines[0]) < 2500
    left = [str(path) for path in tmp_path.iterdir()]
    assert not left, (arguments, left)
    return lines[0]


def value_for(flag, generator):
    if flag.values.choices and generator.random() < 0.2:
        return generator.choice(flag.values.choices)
    return generator.choice(NUMBERS if generator.random() < 0.4 else TEXTS)


def test_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {command: command_flags(command) for command in BASE}
    listed = [(command, name) for command in BASE for name in flags[command]]

    def case(generator):
        command, name = listed[generator.randrange(len(listed))]
        given = dict(BASE[command])
        for each in {name, *(generator.sample(sorted(flags[command]), k=generator.randrange(2)))}:
            given[each] = value_for(flags[command][each], generator)
        if generator.random() < 0.1:
            given[mutated(name.encode(), generator).decode(errors="replace")] = "1"
        arguments = []
        for each, value in given.items():
            arguments += [f"--{each}={value}"] if generator.random() < 0.7 else [f"--{each}", value]
        run_once([command, *arguments], tmp_path)

    isolated(lambda: fuzz("flags", case))


def test_every_flag_is_tried_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work():
        for command, base in BASE.items():
            for name in command_flags(command):
                for value in ("nan", "{}", "") if ALL else ("nan",):
                    given = {**base, name: value}
                    run_once([command, *(f"--{each}={text}" for each, text in given.items())], tmp_path)

    isolated(work)


def test_json_files_of_flags(tmp_path, monkeypatch):
    work, file = tmp_path / "work", tmp_path / "flags.json"
    work.mkdir()
    monkeypatch.chdir(work)
    values = [None, True, -1, 0, 2**63, 1e308, "", "x", [], ["a"], {}, {"a": 1}, [[]], "é" * 100]

    def case(generator):
        command = generator.choice(list(BASE))
        content = {**BASE[command]}
        for name in generator.sample(sorted(command_flags(command)), k=3):
            content[name] = generator.choice(values)
        text = json.dumps(content).encode()
        file.write_bytes(mutated(text, generator) if generator.random() < 0.7 else text)
        run_once([command, str(file)], work)

    isolated(lambda: fuzz("JSON files of flags", case))


def test_nothing_is_run_by_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("$(touch stray)", "`touch stray`", "; touch stray", "| touch stray"):
        run_once(["evaluate", "--model_name_or_path", text], tmp_path)
    assert os.listdir(tmp_path) == []
