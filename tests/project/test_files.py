"""Files that are whole or not there, folders with one writer, and what is made of damaged files."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fsd_fast import files
from fsd_fast.files import LOCK_FILE, exclusive_folder, is_scratch, remove_stale_temporaries, write_atomically
from fsd_fast.untrusted import check_seal, integer, list_of, map_of, number, object_of, read_json_object, seal
from tests.faults.registry import fault

FORK = multiprocessing.get_context("fork")


# --- files ------------------------------------------------------------------------------------------------------


def _write_often(path: Path, content: bytes) -> None:
    for _ in range(150):
        write_atomically(path, content, sync=False)


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    contents = [bytes([letter]) * 100_000 for letter in b"abc"]
    writers = [FORK.Process(target=_write_often, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen <= set(contents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard"]


@fault(
    "a symbolic link lies where a file is about to be written",
    "replaced, not followed",
)
def test_no_symbolic_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    # The name that was once predictable, and the file itself.
    (folder / ".file.tmp").symlink_to(victim)
    (folder / "file").symlink_to(victim)
    write_atomically(folder / "file", b"new")
    assert victim.read_text() == "mine"
    assert (folder / "file").read_bytes() == b"new"
    assert not (folder / "file").is_symlink()
    # Were the name guessed, the link would be refused.
    for target in (victim, tmp_path / "absent"):
        link = folder / f".guessed-{target.name}"
        link.symlink_to(target)
        monkeypatch.setattr(files, "temporary_path", lambda path, link=link: link)
        with pytest.raises(FileExistsError):
            write_atomically(folder / "other", b"new")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "absent").exists()
    (folder / LOCK_FILE).symlink_to(victim)
    with pytest.raises(OSError) as caught:
        exclusive_folder(folder, "output_dir")
    assert caught.value.errno == errno.ELOOP
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_respect_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_json(tmp_path / "record.json", {"a": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == mode


@fault(
    "dead processes have left temporary files",
    "removed; those of living ones stay",
)
def test_what_dead_processes_leave_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = files.temporary_path(tmp_path / "memory.json")
    by_the_dead = left.with_name(left.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    elsewhere = by_the_dead.with_name(by_the_dead.name.replace(files._host(), "another-machine"))
    others = [tmp_path / name for name in (".memory.json.tmp", "memory.json", ".hidden", elsewhere.name)]
    for path in (left, by_the_dead, *others):
        path.write_bytes(b"half")
    remove_stale_temporaries(tmp_path)
    assert not by_the_dead.exists()
    # This process may still be writing; of other machines nothing is known; other files are not ours.
    assert all(path.exists() for path in (left, *others))
    by_the_dead.write_bytes(b"half")
    with exclusive_folder(tmp_path, "output_dir"):
        assert not by_the_dead.exists()
    assert [is_scratch(path.name) for path in (left, elsewhere, tmp_path / "memory.json")] == [
        True,
        True,
        False,
    ]


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with exclusive_folder(folder, "output_dir"):
        message = (
            rf"^output_dir: {folder} is being written by process {os.getpid()} on \S+; wait for it, or choose"
        )
        with pytest.raises(BlockingIOError, match=message):
            exclusive_folder(folder, "output_dir")
        assert is_scratch(LOCK_FILE)
    assert list(folder.iterdir()) == []
    with exclusive_folder(folder, "output_dir"):
        pass
    with pytest.raises(ZeroDivisionError), exclusive_folder(folder, "output_dir"):
        1 / 0  # noqa: B018
    assert list(folder.iterdir()) == []


def _hold(folder: Path, ready: Any) -> None:
    with exclusive_folder(folder, "output_dir"):
        ready.set()
        time.sleep(60)


@fault(
    "the holder of a lock is killed",
    "the folder is free at once",
)
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    ready = FORK.Event()
    holder = FORK.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
        exclusive_folder(tmp_path, "output_dir")
    os.kill(holder.pid, signal.SIGKILL)  # type: ignore[arg-type]
    holder.join()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    with exclusive_folder(tmp_path, "output_dir"):
        pass
    assert list(tmp_path.iterdir()) == []


def _count(folder: Path) -> None:
    done = 0
    while done < 40:
        try:
            with exclusive_folder(folder, "output_dir"):
                total = int((folder.parent / "total").read_text())
                (folder.parent / "total").write_text(str(total + 1))
                done += 1
        except BlockingIOError:
            continue


def test_no_two_processes_ever_hold_a_lock_that_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "total").write_text("0")
    counters = [FORK.Process(target=_count, args=(tmp_path / "folder",)) for _ in range(3)]
    for counter in counters:
        counter.start()
    for counter in counters:
        counter.join()
        assert counter.exitcode == 0
    assert (tmp_path / "total").read_text() == "120"


@fault(
    "the file system has no locks",
    "used, with a warning",
)
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> Callable[[int, int], None]:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(code, os.strerror(code))

        return flock

    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    with pytest.warns(RuntimeWarning, match="the file system of .* has no locks"):
        exclusive_folder(tmp_path, "output_dir").release()
    monkeypatch.setattr(fcntl, "flock", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        exclusive_folder(tmp_path, "output_dir")


# --- damaged files ----------------------------------------------------------------------------------------------


@fault(
    "JSON that is half, deep, huge, has duplicate keys, NaN or integers beyond 64 bits",
    "one line that names the file",
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": 1', "not a JSON file"),
        (b'{"a": "\xff"}', "not a JSON file: expected UTF-8, got byte 0xff"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs more than once"),
        (b'{"a": {"b": NaN}}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 9223372036854775808}', "9223372036854775808.* is not an integer of 64 bits"),
        (b'{"a": ' + b"7" * 100_000 + b"}", "7777.* is not an integer of 64 bits"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
        (b'{"a":' * 100_000, "nested more than 32 deep"),
        (b"[" * 1_000_000, "nested more than 32 deep"),
    ],
)
def test_json_that_is_none_of_ours_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 400


def test_a_huge_json_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ValueError, match=r"expected a JSON file of at most 16,777,216 bytes, got 1,099,511,627,776"
    ):
        read_json_object(path)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    record = {"a": [1, -(2**63), 2**63 - 1, 0.1, 1e300, True, None], "b": {"ü": "\u2028", "": {}}}
    files.write_json(tmp_path / "record.json", seal(record))
    found = read_json_object(tmp_path / "record.json")
    check_seal(found, "x")
    del found["checksum"]
    assert found == record


def test_a_seal_tells_every_change() -> None:
    sealed = seal({"a": 1, "b": [1.5, {"c": "x"}]})
    check_seal(sealed, "x")
    changes: list[dict[str, Any]] = [
        {"a": 2},
        {"a": True},
        {"a": 1.0},
        {"b": [1.5, {"c": "y"}]},
        {"checksum": "0" * 64},
        {"checksum": None},
        {"d": 1},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="x: its checksum is not that of its fields"):
            check_seal(sealed | change, "x")
    without = {name: value for name, value in sealed.items() if name != "a"}
    with pytest.raises(ValueError, match="checksum"):
        check_seal(without, "x")


def _refused() -> Iterator[tuple[Any, Any, str]]:
    yield integer(), True, "f: expected an integer, got True"
    yield integer(1), 0, "f: expected an integer of at least 1, got 0"
    yield integer(), 1.0, "f: expected an integer, got 1.0"
    yield number(0), -0.5, "f: expected a finite number of at least 0, got -0.5"
    yield number(0), float("inf"), "f: expected a finite number of at least 0, got inf"
    yield number(0), float("nan"), "f: expected a finite number of at least 0, got nan"
    yield number(0), False, "f: expected a finite number of at least 0, got False"
    yield list_of(integer()), {"a": 1}, "f: expected a list, got {'a': 1}"
    yield list_of(integer()), [1, "2"], r"f\[1\]: expected an integer, got '2'"
    yield map_of(number(0)), [1], r"f: expected an object, got \[1\]"
    yield map_of(number(0)), {"a": None}, r"f\['a'\]: expected a finite number of at least 0, got None"
    yield object_of({"a": integer(), "b": integer()}), {"a": 1}, "f: fields are missing: b"
    yield object_of({"a": integer()}), {"a": 1, "z": 1}, "f: unknown fields: 'z'"
    yield object_of({"a": integer()}), {"a": "x" * 10_000}, "f: a: expected an integer, got 'xxx"
    yield object_of({"a": integer()}), "text", "f: expected an object, got 'text'"


@pytest.mark.parametrize(("check", "value", "message"), list(_refused()))
def test_fields_of_another_kind_are_named(check: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check(value, "f")
    assert len(str(caught.value)) < 250


def test_differences_are_short(tmp_path: Path) -> None:
    text = files.differences({"a": "x" * 100_000, "b": 1}, {"a": "y", "b": 1})
    assert text.startswith("a is 'xxx")
    assert text.endswith(", expected 'y'")
    assert len(text) < 300
    assert json.loads(json.dumps(files.differences({"a": 1}, {"a": 1}))) == ""
