"""How a command fails: one line, the right exit status, a traceback where one is needed, and one process speaks."""

import pytest
import safetensors

from fsd_fast import cli
from fsd_fast.commands import failures
from fsd_fast.distributed import PeerError
from tests.tiny import memory_flags, save_backbone, tiny

__all__ = ["tiny"]


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command whose input is refused, or whose work fails, with an error; returns (status, stderr lines)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FSD_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(error, working=True):
        def fail(*_):
            raise error

        monkeypatch.setattr(cli, "prepare", (lambda *_: fail) if working else fail)
        status = cli.main(["memory"])
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("the words"), "the words"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
        (RuntimeError("two\n  lines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.tsv"), "a.tsv: No such file or directory"),
        (safetensors.SafetensorError("incomplete"), "SafetensorError: incomplete"),
        (OverflowError("too large"), "OverflowError: too large"),
        (RecursionError("too deep"), "too deep"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 5000), "x" * 1500 + " ..."),
    ],
)
def test_one_line_and_the_status(command, monkeypatch, error, line):
    assert command(error) == (1, [f"fsd-fast memory: failed: {line}"])
    assert command(error, working=False) == (2, [f"fsd-fast memory: error: {line}"])
    monkeypatch.setenv("FSD_DEBUG", "1")
    for working in (True, False):
        _, lines = command(error, working)
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1] == f"fsd-fast memory: {'failed' if working else 'error'}: {line}"


def test_a_fault_of_the_program_keeps_its_traceback(command):
    for error in (KeyError("x"), AttributeError("x"), AssertionError(), IndexError("x"), TypeError("x")):
        status, lines = command(error)
        assert status == 1
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1].startswith(f"fsd-fast memory: failed: {type(error).__name__}")
        # What the input is refused with may be the library's word for bad input.
        status, lines = command(error, working=False)
        assert (status, len(lines)) == (2, 1)


def test_an_interrupt(command, monkeypatch):
    for working in (True, False):
        assert command(KeyboardInterrupt(), working) == (130, ["fsd-fast memory: interrupted"])
    monkeypatch.setenv("RANK", "1")
    assert command(KeyboardInterrupt()) == (130, [])


@pytest.fixture
def waited(monkeypatch):
    """The seconds that failing processes waited."""
    seconds = []
    monkeypatch.setattr(failures.time, "sleep", seconds.append)
    return seconds


def test_the_first_process_speaks_for_all(command, monkeypatch, waited):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for number, node, expected in (("0", "0", 0), ("2", "0", 5), ("3", "1", 10)):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("LOCAL_RANK", node)
        status, lines = command(ValueError("the words"), working=False)
        # Each says it; before the others' turn comes the launcher has ended them.
        assert (status, lines) == (2, ["fsd-fast memory: error: the words"])
        assert waited.pop() == expected


@pytest.mark.parametrize(
    "error",
    [
        PeerError("stopped because process 1 of 2 failed; see its error"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    ],
)
def test_the_process_that_failed_speaks_before_those_that_miss_it(command, monkeypatch, waited, error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    status, lines = command(error)
    assert (status, len(lines)) == (1, 1)
    assert waited == [15]
    assert failures._SECONDS_FOR_PEER > failures._SECONDS_FOR_LOCAL_FIRST
    monkeypatch.setenv("RANK", "1")
    assert command(error) == (1, [])


def test_a_process_group_is_not_waited_for(command, monkeypatch):
    ended = []
    monkeypatch.setattr(failures.os, "_exit", ended.append)
    assert command(ValueError("x"))[0] == 1
    assert ended == []
    group = type("group", (), {})
    group.is_available = group.is_initialized = staticmethod(lambda: True)
    group.get_world_size = staticmethod(lambda: 2)
    monkeypatch.setitem(failures.sys.modules, "torch.distributed", group)
    command(ValueError("x"))
    assert ended == [1]


def test_a_damaged_model_is_refused(tiny, tmp_path, capsys):
    teacher = save_backbone(tmp_path / "teacher")
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = [*memory_flags(tiny, tmp_path / "run"), "--teacher_model_name_or_path", str(teacher)]
    assert cli.main(["memory", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"fsd-fast memory: error: {weights}: damaged")
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_is_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = [*tiny.distillation(tmp_path / "run"), "--backend", "triton"]
    assert cli.main(["distill", *flags]) == 2
    assert "error: intra_cka: backend 'triton' was asked for, but" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("FSD_BACKEND", "triton")
    assert cli.main(["memory", *memory_flags(tiny, tmp_path / "run")]) == 2
    assert "error: kmeans: backend 'triton' was asked for, but" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
