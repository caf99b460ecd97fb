"""The shards of a teacher cache: one safetensors file for each batch that the teacher computed.

    sample_index [b] int64, lengths [b] int64          which samples, and how many positions each takes
    checksums [b, 1 + L] int64                         crc32 of each sample's logits, then of each layer
    logits [b, C] float32
    hidden_states.<layer> [sum of lengths, D]          of L layers, the samples one behind the other

A shard comes under its name when it is complete. Its index has a checksum, and so have the values of each sample, so
that a damaged byte is found when it is read and costs the samples it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fsd_fast.cache.identity import CacheIdentity
from fsd_fast.files import write_atomically

SUFFIX = ".safetensors"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class DamagedShard(Exception):
    """A file is no whole shard of this cache."""


class ShardIndex(NamedTuple):
    """Which samples a shard holds."""

    sample_index: Tensor
    """int64 [b]: places in the training set."""
    lengths: Tensor
    """int64 [b]: positions that are kept."""
    checksums: Tensor
    """int64 [b, 1 + L]: crc32 of the logits and of each layer."""


class SampleValues(NamedTuple):
    """What a shard holds of one sample."""

    logits: Tensor
    """float32 [C]."""
    hidden_states: dict[int, Tensor]
    """Layer -> [length, D]."""


def layer_name(layer: int) -> str:
    """Name of a layer's tensor in a shard."""
    return f"hidden_states.{layer}"


def crc32(values: Tensor) -> int:
    """crc32 of a tensor's bytes."""
    return zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy().data)


def write_shard(
    folder: Path, identity: CacheIdentity, index: ShardIndex, logits: Tensor, layers: Mapping[int, Tensor]
) -> Path:
    """Write a shard: ``logits`` [b, C] and ``layers``, each [sum of lengths, D], on the CPU. Returns its path.

    Raises:
        OSError: It cannot be written. Nothing of it stays behind.
    """
    tensors = {**index._asdict(), "logits": logits}
    tensors |= {layer_name(layer): values for layer, values in layers.items()}
    metadata = {"identity": identity.digest(), "index_crc32": _index_crc32(index)}
    name = hashlib.sha256(index.sample_index.numpy().tobytes()).hexdigest()[:32]
    path = folder / f"{name}{SUFFIX}"
    # Without waiting for the disk: checksums tell what a failing machine has left of it.
    write_atomically(path, save_safetensors(tensors, metadata), sync=False)
    return path


def _index_crc32(index: ShardIndex) -> str:
    return f"{crc32(torch.cat([values.flatten() for values in index])):08x}"


def read_index(path: Path, identity: CacheIdentity) -> ShardIndex:
    """Read which samples a shard holds.

    Raises:
        DamagedShard: It is no whole shard of this cache.
        Exception: One of ``TENSOR_ERRORS``: it is no safetensors file.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("identity") != identity.digest():
            raise DamagedShard("it is of another cache")
        _check_shape(file, "sample_index", torch.int64, [None])
        count = file.get_slice("sample_index").get_shape()[0]
        _check_shape(file, "lengths", torch.int64, [count])
        _check_shape(file, "checksums", torch.int64, [count, 1 + len(identity.layers)])
        # Copies: what is mapped would keep the file's pages.
        index = ShardIndex(*(file.get_tensor(name).clone() for name in ShardIndex._fields))
        if metadata.get("index_crc32") != _index_crc32(index):
            raise DamagedShard("its sample indices have another checksum")
        _check_range("sample_index", index.sample_index, identity.num_samples)
        _check_range("lengths", index.lengths, identity.max_seq_length + 1)
        _check_values(file, identity, index)
    return index


class OpenShard:
    """A shard whose samples are read one at a time.

    The file is read and not mapped: what was read is no memory of this process, and a file that was cut off since gives
    too few bytes, where touching a mapped page beyond its end would kill the process.

    Args:
        path: Its file.
        identity: Of the cache.
        index: What it held when it was found.

    Raises:
        DamagedShard: It no longer is the shard of that index.
        Exception: One of ``TENSOR_ERRORS``: it is gone or no safetensors file.
    """

    def __init__(self, path: Path, identity: CacheIdentity, index: ShardIndex) -> None:
        with _opened(path) as checked:
            if (checked.metadata() or {}).get("index_crc32") != _index_crc32(index):
                raise DamagedShard("it was replaced")
            _check_values(checked, identity, index)
            self._file = path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
            size = int.from_bytes(self._read(8, 0), "little")
            header = json.loads(self._read(size, 8))
        self._starts = {
            name: 8 + size + header[name]["data_offsets"][0]
            for name in ("logits", *map(layer_name, identity.layers))
        }
        self._classes, self._width = identity.num_labels, identity.hidden_size
        self._dtype: torch.dtype = getattr(torch, identity.dtype)

    def read(self, row: int, start: int, end: int, layers: Sequence[int]) -> SampleValues:
        """Read the sample in a row, whose positions are ``start`` to ``end``.

        Raises:
            DamagedShard: The file has become shorter.
            OSError: It cannot be read.
        """
        logits = self._rows("logits", torch.float32, self._classes, row, row + 1)[0]
        return SampleValues(
            logits,
            {layer: self._rows(layer_name(layer), self._dtype, self._width, start, end) for layer in layers},
        )

    def _rows(self, name: str, dtype: torch.dtype, width: int, start: int, end: int) -> Tensor:
        bytes_of_row = width * dtype.itemsize
        content = self._read((end - start) * bytes_of_row, self._starts[name] + start * bytes_of_row)
        if not content:  # which torch.frombuffer refuses
            return torch.empty(0, width, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).view(-1, width)

    def _read(self, count: int, offset: int) -> bytearray:
        content = bytearray(count)
        if os.preadv(self._file.fileno(), [content], offset) < count:
            raise DamagedShard(f"it ends after {os.fstat(self._file.fileno()).st_size:,} bytes")
        return content


def _opened(path: Path) -> Any:
    # Opening a pipe would wait for its writer.
    if not path.is_file():
        raise DamagedShard("it is not a file")
    return safe_open(path, "pt")


def _check_values(file: Any, identity: CacheIdentity, index: ShardIndex) -> None:
    _check_shape(file, "logits", torch.float32, [len(index.lengths), identity.num_labels])
    shape = [int(index.lengths.sum()), identity.hidden_size]
    for layer in identity.layers:
        _check_shape(file, layer_name(layer), getattr(torch, identity.dtype), shape)


def _check_shape(file: Any, name: str, dtype: torch.dtype, shape: Sequence[int | None]) -> None:
    stored = file.get_slice(name)
    found = stored.get_shape()
    fits = len(found) == len(shape) and all(
        size in (None, own) for size, own in zip(shape, found, strict=True)
    )
    if stored.get_dtype() != _NAMES[dtype] or not fits:
        wanted = ["b" if size is None else size for size in shape]
        raise DamagedShard(f"{name}: expected {_NAMES[dtype]} {wanted}, got {stored.get_dtype()} {found}")


def _check_range(name: str, values: Tensor, limit: int) -> None:
    if values.numel() and not (0 <= int(values.min()) and int(values.max()) < limit):
        raise DamagedShard(f"{name}: expected values from 0 to {limit - 1}")
