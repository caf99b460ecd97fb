"""The teacher's features of a training set on disk, so that a second pass need not run the teacher.

    <folder>/features.json             whose features these are, sealed by a checksum
    <folder>/<digest>.safetensors      of a batch: sample_index [b], lengths [b], features [sum of lengths, D]

A sample takes as many positions as count: all S under "include", those up to its last token under "exclude", with
zeros at padding. Samples are found by their indices, so a reader need not have the batches, or the number of
processes, of the writer. A shard comes under its name when it is complete, and a checksum tells whether it still is:
a half-written one is never loaded. One run at a time writes (``exclusive_folder``); readers take no lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.files import differences, write_atomically, write_json
from fsd_fast.untrusted import CHECKSUM, TENSOR_ERRORS, check_seal, read_json_object, seal, shorten

IDENTITY_FILE = "features.json"
_FORMAT = 2
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class FeatureIdentity:
    """Whose features a cache holds. A run that reads it must agree in every field.

    Attributes:
        task_name: The task whose training set this is.
        teacher_fingerprint: sha256 of the teacher's parameters.
        layer: Index of the hidden states, 0 = embeddings.
        max_seq_length: S.
        hidden_size: D.
        pad_features: "include" (all S positions are kept) or "exclude" (padding is left out).
        dtype: Of the features, such as "float32".
        num_samples: N; sample indices run from 0 to N - 1.
        tokens: sha256 of the training set's tokens.
    """

    task_name: str
    teacher_fingerprint: str
    layer: int
    max_seq_length: int
    hidden_size: int
    pad_features: str
    dtype: str
    num_samples: int
    tokens: str

    def record(self) -> dict[str, object]:
        """All fields, as they are written."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    def digest(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


class _Damaged(Exception):
    """A file is no whole shard of this cache."""


class FeatureCache:
    """The features of samples in a folder.

    Args:
        folder: Where they are, or will be.
        identity: Whose features they are. Must be that of the cache found, if there is one.

    Raises:
        ValueError: The folder holds another cache (every field that differs is listed), a damaged one, or other files.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: FeatureIdentity) -> None:
        self._folder = Path(folder)
        self._identity = identity
        self._dtype: torch.dtype = getattr(torch, identity.dtype)
        self._shards: list[Path] = []
        self._checked: set[int] = set()
        # Of each sample its shard (-1: none), its first position there, and how many it takes.
        self._shard = torch.full((identity.num_samples,), -1, dtype=torch.int64)
        self._start = torch.zeros(identity.num_samples, dtype=torch.int64)
        self._length = torch.zeros(identity.num_samples, dtype=torch.int64)
        if (self._folder / IDENTITY_FILE).is_file():
            self._check_identity(self._folder / IDENTITY_FILE)
            self.scan()
        elif self._folder.exists() and (
            not self._folder.is_dir() or any(path.name[0] != "." for path in self._folder.iterdir())
        ):
            raise ValueError(
                f"feature_cache_dir: {folder} is neither a feature cache nor an empty folder; choose another one"
            )

    @property
    def folder(self) -> Path:
        """Where the features are."""
        return self._folder

    def _check_identity(self, path: Path) -> None:
        try:
            found = read_json_object(path)
            different = differences({**found, CHECKSUM: None}, {**self._identity.record(), CHECKSUM: None})
            # Those of an earlier format are told by it.
            if not different or found.get("format") == _FORMAT:
                check_seal(found, path)
        except ValueError as error:
            raise ValueError(
                f"{error}. It is not the identity of a feature cache: choose another folder"
            ) from None
        if different:
            raise ValueError(
                f"feature_cache_dir: {path.parent} was made for another run: {different}. Choose another folder"
            )

    def scan(self) -> None:
        """Look for shards that other processes have written."""
        for path in sorted(set(self._folder.glob("[!.]*.safetensors")) - set(self._shards)):
            self._open(path)

    def _open(self, path: Path) -> None:
        """Note the samples of a shard; a damaged one is left out with a warning."""
        with self._damage_is_a_warning(path), _opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self._identity.digest():
                raise _Damaged("it is of another cache")
            sample_index, lengths = file.get_tensor("sample_index"), file.get_tensor("lengths")
            stored = file.get_slice("features")
            if metadata.get("index_crc32") != _checksum(torch.cat([sample_index, lengths])):
                raise _Damaged("its sample indices have another checksum")
            self._check_index(sample_index, lengths)
            shape = [int(lengths.sum()), self._identity.hidden_size]
            if stored.get_shape() != shape or stored.get_dtype() != _SAFETENSORS_DTYPES[self._dtype]:
                raise _Damaged(
                    f"features {stored.get_dtype()} {stored.get_shape()}, expected {self._dtype} {shape}"
                )
            self._note(path, sample_index, lengths)

    def _check_index(self, sample_index: Tensor, lengths: Tensor) -> None:
        identity = self._identity
        for name, values, limit in (
            ("sample_index", sample_index, identity.num_samples),
            ("lengths", lengths, identity.max_seq_length + 1),
        ):
            if values.dtype != torch.int64 or values.shape != (len(sample_index),) or values.ndim != 1:
                raise _Damaged(f"{name}: expected int64 [b], got {values.dtype} {list(values.shape)}")
            if values.numel() and not (0 <= int(values.min()) and int(values.max()) < limit):
                raise _Damaged(f"{name}: expected values from 0 to {limit - 1}")

    @contextmanager
    def _damage_is_a_warning(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (*TENSOR_ERRORS, _Damaged) as error:
            warnings.warn(
                f"{path} is damaged ({shorten(str(error))}): its samples are computed again",
                RuntimeWarning,
                stacklevel=4,
            )

    def _note(self, path: Path, sample_index: Tensor, lengths: Tensor) -> None:
        self._shard[sample_index] = len(self._shards)
        self._start[sample_index] = lengths.cumsum(0) - lengths
        self._length[sample_index] = lengths
        self._shards.append(path)

    def holds(self, sample_index: Tensor) -> bool:
        """Whether all samples of these indices, int64 ``[b]``, are there."""
        return bool((self._shard[sample_index] >= 0).all())

    def is_whole(self) -> bool:
        """Whether all samples are there."""
        return bool((self._shard >= 0).all())

    def check_room(self, positions: int) -> None:
        """Check that so many more positions of samples, of all processes, have room.

        Raises:
            ValueError: The disk has less.
        """
        needed = positions * self._identity.hidden_size * self._dtype.itemsize
        existing = next(
            folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists()
        )
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise ValueError(
                f"feature_cache_dir: {self._folder} needs {needed:,} bytes for the features; its disk has {free:,} free"
            )

    def create(self) -> None:
        """Make the folder; one process does that for all.

        Raises:
            OSError: It cannot be written.
        """
        if not (self._folder / IDENTITY_FILE).is_file():
            write_json(self._folder / IDENTITY_FILE, seal(self._identity.record()))

    def write(self, sample_index: Tensor, features: Tensor, attention_mask: Tensor | None) -> None:
        """Keep the features of a batch.

        Args:
            sample_index: The samples' indices, int64 ``[b]``.
            features: ``[b, S_b, D]``; S_b is S under "include".
            attention_mask: ``[b, S_b]``, 1 = token; None: no padding. Ignored under "include".

        Raises:
            OSError: The disk is full or cannot be written. Nothing of this batch stays behind; what was written
                before is whole.
        """
        sample_index = sample_index.contiguous()
        lengths = torch.full(sample_index.shape, features.shape[1], dtype=torch.int64)
        if self._identity.pad_features == "exclude" and attention_mask is not None:
            is_token = attention_mask.to(features.device) != 0
            features = features.masked_fill(~is_token[:, :, None], 0)
            ends = torch.arange(1, is_token.shape[1] + 1, device=is_token.device)
            lengths = (is_token * ends).amax(dim=1).cpu()
        inside = torch.arange(features.shape[1]) < lengths[:, None]
        values = {
            "sample_index": sample_index,
            "lengths": lengths,
            "features": features.detach().cpu()[inside],
        }
        metadata = {
            "identity": self._identity.digest(),
            "index_crc32": _checksum(torch.cat([sample_index, lengths])),
            "features_crc32": _checksum(values["features"]),
        }
        path = self._folder / f"{hashlib.sha256(sample_index.numpy().tobytes()).hexdigest()[:32]}.safetensors"
        try:
            # The checksum tells what a failing machine has left of it.
            write_atomically(path, save_safetensors(values, metadata), sync=False)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the feature cache cannot be written ({error.strerror}); the batches written so far are whole and "
                f"the same command goes on from them",
                str(path),
            ) from error
        self._checked.add(len(self._shards))
        self._note(path, sample_index, lengths)

    def read(self, sample_index: Tensor) -> Tensor | None:
        """Features ``[b, L, D]`` of the samples of these indices, L the longest; zeros follow the shorter ones.

        None where one of them is not there, or was found damaged (with a warning): compute and write them again.
        """
        if not self.holds(sample_index):
            return None
        shards = self._shard[sample_index]
        shape = (len(sample_index), int(self._length[sample_index].max()), self._identity.hidden_size)
        features = torch.zeros(shape, dtype=self._dtype)
        for shard in shards.unique().tolist():
            whole = False
            with self._damage_is_a_warning(self._shards[shard]), _opened(self._shards[shard]) as file:
                self._check_features(shard, file)
                stored = file.get_slice("features")
                for row in (shards == shard).nonzero().flatten().tolist():
                    start, length = int(self._start[sample_index[row]]), int(self._length[sample_index[row]])
                    features[row, :length] = stored[start : start + length]
                whole = True
            if not whole:
                self._shard[self._shard == shard] = -1
                return None
        return features

    def _check_features(self, shard: int, file: Any) -> None:
        """Compare the checksum of a shard's features, once."""
        if shard not in self._checked:
            stored = file.get_tensor("features")
            if stored.dtype != self._dtype or _checksum(stored) != file.metadata()["features_crc32"]:
                raise _Damaged("its features have another checksum")
            self._checked.add(shard)


def _opened(path: Path) -> Any:
    # Opening a pipe would wait for its writer.
    if not path.is_file():
        raise _Damaged("it is not a file")
    return safe_open(path, "pt")


def _checksum(values: Tensor) -> str:
    return f"{zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy().data):08x}"
