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


class ShardValues(NamedTuple):
    """What a shard holds of its samples, mapped from the file and not yet read."""

    logits: Tensor
    """float32 [b, C]."""
    hidden_states: dict[int, Tensor]
    """Layer -> [sum of lengths, D]."""


def layer_name(layer: int) -> str:
    """Name of a layer's tensor in a shard."""
    return f"hidden_states.{layer}"


def crc32(values: Tensor) -> int:
    """crc32 of a tensor's bytes."""
    return zlib.crc32(values.contiguous().flatten().view(torch.uint8).numpy().data)


def write_shard(
    folder: Path, identity: CacheIdentity, index: ShardIndex, logits: Tensor, layers: Mapping[int, Tensor]
) -> Path:
    """Write a shard; ``logits`` and ``layers`` are as in ``ShardValues``, on the CPU. Returns its path.

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


def map_values(path: Path, identity: CacheIdentity, index: ShardIndex) -> ShardValues:
    """Map a shard's values into memory; the system reads them where they are looked at.

    Raises:
        DamagedShard: It no longer is the shard of that index.
        Exception: One of ``TENSOR_ERRORS``: it is gone or no safetensors file.
    """
    with _opened(path) as file:
        if (file.metadata() or {}).get("index_crc32") != _index_crc32(index):
            raise DamagedShard("it was replaced")
        _check_values(file, identity, index)
        layers = {layer: file.get_tensor(layer_name(layer)) for layer in identity.layers}
        return ShardValues(file.get_tensor("logits"), layers)


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
