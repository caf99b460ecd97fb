"""The teacher's features of a training set on disk, so that a second reading need not run the teacher.

    <folder>/features.json             whose features these are
    <folder>/<digest>.safetensors      the samples of a batch: index [b], lengths [b], features [sum of lengths, D]

A sample takes as many positions as count: all S under "include", those up to its last token under "exclude", with
zeros at padding. Samples are found by their numbers, so a reader need not have the batches, or the number of
processes, of the writer. A shard comes under its name when it is complete, and a checksum tells whether it still is:
a half-written one is never loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.files import differences, write_atomically, write_json

IDENTITY_FILE = "features.json"
_FORMAT = 1


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
        num_samples: N; samples are numbered from 0 to N - 1.
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
    """The features of numbered samples in a folder.

    Args:
        folder: Where they are, or will be.
        identity: Whose features they are. Must be that of the cache found, if there is one.

    Raises:
        ValueError: The folder holds another cache (every field that differs is listed), or other files.
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

    def _check_identity(self, path: Path) -> None:
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the identity of a feature cache ({error})") from error
        different = differences(found, self._identity.record())
        if different:
            raise ValueError(
                f"feature_cache_dir: {path.parent} was made for another run: {different}. Choose another folder"
            )

    def scan(self) -> None:
        """Look for shards that other processes have written."""
        for path in sorted(set(self._folder.glob("[!.]*.safetensors")) - set(self._shards)):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self._identity.digest():
                    raise _Damaged("it is of another cache")
                index, lengths = file.get_tensor("index"), file.get_tensor("lengths")
                shape = file.get_slice("features").get_shape()
            if metadata["numbers_crc32"] != _checksum(torch.cat([index, lengths])):
                raise _Damaged("its numbers have another checksum")
            if shape != [int(lengths.sum()), self._identity.hidden_size]:
                raise _Damaged(f"features {shape} of samples with {int(lengths.sum())} positions")
            self._note(path, index, lengths)
        except (SafetensorError, OSError, _Damaged) as error:
            self._warn(path, error)

    def _note(self, path: Path, index: Tensor, lengths: Tensor) -> None:
        self._shard[index] = len(self._shards)
        self._start[index] = lengths.cumsum(0) - lengths
        self._length[index] = lengths
        self._shards.append(path)

    def _warn(self, path: Path, error: Exception) -> None:
        warnings.warn(
            f"{path} is damaged ({error}): its samples are computed again", RuntimeWarning, stacklevel=2
        )

    def holds(self, index: Tensor) -> bool:
        """Whether all samples of these numbers, int64 ``[b]``, are there."""
        return bool((self._shard[index] >= 0).all())

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
            write_json(self._folder / IDENTITY_FILE, self._identity.record())

    def write(self, index: Tensor, features: Tensor, attention_mask: Tensor | None) -> None:
        """Keep the features of a batch.

        Args:
            index: The samples' numbers, int64 ``[b]``.
            features: ``[b, S_b, D]``; S_b is S under "include".
            attention_mask: ``[b, S_b]``, 1 = token; None: no padding. Of no account under "include".

        Raises:
            OSError: The disk is full or cannot be written. Nothing of this batch stays behind; what was written
                before is whole.
        """
        index = index.contiguous()
        lengths = torch.full(index.shape, features.shape[1], dtype=torch.int64)
        if self._identity.pad_features == "exclude" and attention_mask is not None:
            kept = attention_mask.to(features.device) != 0
            features = features.masked_fill(~kept[:, :, None], 0)
            lengths = (kept * torch.arange(1, kept.shape[1] + 1, device=kept.device)).amax(dim=1).cpu()
        inside = torch.arange(features.shape[1]) < lengths[:, None]
        values = {"index": index, "lengths": lengths, "features": features.detach().cpu()[inside]}
        metadata = {
            "identity": self._identity.digest(),
            "numbers_crc32": _checksum(torch.cat([index, lengths])),
            "features_crc32": _checksum(values["features"]),
        }
        path = self._folder / f"{hashlib.sha256(index.numpy().tobytes()).hexdigest()[:32]}.safetensors"
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
        self._note(path, index, lengths)

    def read(self, index: Tensor) -> Tensor | None:
        """Features ``[b, L, D]`` of the samples of these numbers, L the longest; zeros follow the shorter ones.

        None where one of them is not there, or was found damaged (with a warning): compute and write them again.
        """
        shards = self._shard[index]
        if not self.holds(index):
            return None
        shape = (len(index), int(self._length[index].max()), self._identity.hidden_size)
        features = torch.zeros(shape, dtype=self._dtype)
        for shard in shards.unique().tolist():
            try:
                with safe_open(self._shards[shard], "pt") as file:
                    if shard not in self._checked:
                        stored = file.get_tensor("features")
                        if (
                            stored.dtype != self._dtype
                            or _checksum(stored) != file.metadata()["features_crc32"]
                        ):
                            raise _Damaged("its features have another checksum")
                        self._checked.add(shard)
                    stored = file.get_slice("features")
                    for row in (shards == shard).nonzero().flatten().tolist():
                        start, length = int(self._start[index[row]]), int(self._length[index[row]])
                        features[row, :length] = stored[start : start + length]
            except (SafetensorError, OSError, _Damaged) as error:
                self._warn(self._shards[shard], error)
                self._shard[self._shard == shard] = -1
                return None
        return features


def _checksum(values: Tensor) -> str:
    return f"{zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy().data):08x}"
