"""A teacher's logits and hidden states of a training set on disk, so that the teacher runs once.

    <folder>/teacher_cache.json        what the numbers depend on, sealed by a checksum
    <folder>/<digest>.safetensors      of a batch that the teacher computed, see ``shards``

A sample takes as many positions as count: all S under "include", those up to its last token under "exclude", with
zeros at padding. Samples are found by their indices, so a reader need not have the batches, or the number of
processes, of the writer. A half-written or damaged shard is never read. One run at a time writes
(``exclusive_folder``); readers take no lock.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fsd_fast.cache.identity import (
    CacheIdentity,
    CacheRecord,
    check_readable,
    read_record,
    write_record,
)
from fsd_fast.cache.shards import (
    SUFFIX,
    DamagedShard,
    OpenShard,
    SampleValues,
    ShardIndex,
    crc32,
    read_index,
    write_shard,
)
from fsd_fast.untrusted import TENSOR_ERRORS, shorten

EVALUATION_FOLDER = "evaluation"
"""Folder in a cache for the teacher's logits on the evaluation splits."""
# Well below the files that a process may have open by default.
_MAXIMUM_OPEN = 256
_NO_SHARD = -1


class CachedBatch(NamedTuple):
    """What the teacher computed for a batch."""

    logits: Tensor
    """float32 [b, C]."""
    hidden_states: dict[int, Tensor]
    """Layer -> [b, L, D] in the cache's dtype; zeros follow the positions that a sample takes."""


class TeacherCache:
    """The logits and hidden states of samples in a folder.

    Args:
        folder: Where they are, or will be.
        wanted: What this run would compute, with the layers that it reads. A cache that is there must be readable for
            it, see ``check_readable``.
        weights: sha256 of the teacher's files, for the record of a new cache; None where it came from no folder.

    Attributes:
        identity: Of the cache that is there, else ``wanted``.
        layers: Indices of the hidden states that the run reads.

    Raises:
        ValueError: The folder holds another cache, a damaged one, or other files.
    """

    def __init__(
        self, folder: str | os.PathLike[str], wanted: CacheIdentity, weights: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.layers = wanted.layers
        found = read_record(self.folder)
        if found is not None:
            check_readable(self.folder, found.identity, wanted)
        elif self.folder.exists() and (
            not self.folder.is_dir() or any(path.name[0] != "." for path in self.folder.iterdir())
        ):
            raise ValueError(
                f"teacher_cache_dir: {folder} is neither a teacher cache nor an empty folder; choose another one"
            )
        self._record = found or CacheRecord(wanted, weights)
        self.identity = self._record.identity
        self._paths: list[Path] = []
        self._indices: list[ShardIndex] = []
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        samples = self.identity.num_samples
        # Where each sample is: its shard, its row there, and its first position.
        self._shard = torch.full((samples,), _NO_SHARD, dtype=torch.int64)
        self._row = torch.zeros(samples, dtype=torch.int64)
        self._start = torch.zeros(samples, dtype=torch.int64)
        self._length = torch.zeros(samples, dtype=torch.int64)
        self._checked = torch.zeros(samples, 1 + len(self.identity.layers), dtype=torch.bool)
        if found is not None:
            self.scan()

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored hidden states."""
        dtype: torch.dtype = getattr(torch, self.identity.dtype)
        return dtype

    # ------------------------------------------------------------------------------------------ what is there

    def scan(self) -> None:
        """Look for shards that other processes have written; of a sample in several the newest counts."""
        known = set(self._paths)
        for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}"), key=_age):
            if path not in known:
                with self._damage_is_a_warning(path):
                    self._note(path, read_index(path, self.identity))

    def _note(self, path: Path, index: ShardIndex) -> None:
        samples = index.sample_index
        self._shard[samples] = len(self._paths)
        self._row[samples] = torch.arange(len(samples))
        self._start[samples] = index.lengths.cumsum(0) - index.lengths
        self._length[samples] = index.lengths
        self._checked[samples] = False
        self._paths.append(path)
        self._indices.append(index)

    def holds(self, sample_index: Tensor) -> bool:
        """Whether all samples of these indices, int64 ``[b]``, are there."""
        return bool((self._shard[sample_index] != _NO_SHARD).all())

    def missing(self) -> Tensor:
        """Indices int64 ``[n]`` of the samples that are not there, ascending."""
        return (self._shard == _NO_SHARD).nonzero().flatten()

    def is_whole(self) -> bool:
        """Whether all samples are there."""
        return self.holds(torch.arange(self.identity.num_samples))

    def missing_bytes(self, lengths: Tensor) -> int:
        """Bytes that the samples which are not there will take.

        Args:
            lengths: Tokens of every sample, int64 ``[N]``.
        """
        missing = lengths[self.missing()]
        if self.identity.pad_features == "include":
            missing = torch.full_like(missing, self.identity.max_seq_length)
        fixed, position = self.identity.sample_bytes(0), self.identity.position_bytes()
        return len(missing) * fixed + int(missing.sum()) * position

    def free_bytes(self) -> int:
        """Bytes free on the disk of the folder, which need not exist yet."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    # ------------------------------------------------------------------------------------------ writing

    def remove_useless(self) -> None:
        """Remove shards that no sample is read from: damaged ones, whose samples were written again. For a writer."""
        used = {self._paths[shard] for shard in self._shard[self._shard != _NO_SHARD].unique().tolist()}
        for path in set(self.folder.glob(f"[!.]*{SUFFIX}")) - used:
            path.unlink(missing_ok=True)

    def create(self) -> None:
        """Make the folder and its record, if there is none; one process does that for all.

        Raises:
            OSError: It cannot be written.
        """
        if read_record(self.folder) is None:
            write_record(self.folder, self._record)

    def write(
        self,
        sample_index: Tensor,
        logits: Tensor,
        hidden_states: Mapping[int, Tensor],
        attention_mask: Tensor | None,
    ) -> None:
        """Keep what the teacher computed for a batch; samples that are there already are left out.

        Args:
            sample_index: The samples' indices, int64 ``[b]``, on the CPU.
            logits: ``[b, C]``.
            hidden_states: ``[b, S_b, D]`` for each of the cache's layers; S_b is S under "include".
            attention_mask: ``[b, S_b]``, 1 = token; None: no padding. Ignored under "include".

        Raises:
            ValueError: A number that counts is not finite; the message names the sample. Nothing of this batch is
                written.
            OSError: The disk is full or cannot be written. Nothing of this batch stays behind; what was written before
                is whole.
        """
        rows = self._new_rows(sample_index.tolist())
        if not rows:
            return
        index = sample_index[rows].contiguous()
        lengths, is_token = self._positions(hidden_states, attention_mask, len(sample_index))
        lengths = lengths[rows]
        stored_logits = logits.detach().float().cpu()[rows]
        stored = {}
        for layer in self.identity.layers:
            values = hidden_states[layer].detach().to(self.dtype)
            if is_token is not None:
                values = values.masked_fill(~is_token[:, :, None], 0)
            stored[layer] = [
                row[:length] for row, length in zip(values.cpu()[rows], lengths.tolist(), strict=True)
            ]
        self._check_finite(index, "logits", list(stored_logits))
        for layer, kept in stored.items():
            self._check_finite(index, f"hidden states of layer {layer}", kept)
        columns = [list(stored_logits), *stored.values()]
        checksums = torch.tensor([[crc32(values) for values in column] for column in columns]).T.contiguous()
        flat = {layer: torch.cat(kept) for layer, kept in stored.items()}
        shard = ShardIndex(index, lengths, checksums)
        try:
            path = write_shard(self.folder, self.identity, shard, stored_logits, flat)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the teacher cache cannot be written ({error.strerror}); the batches written so far are whole and "
                f"the same command goes on from them",
                str(self.folder),
            ) from error
        self._note(path, shard)

    def _new_rows(self, samples: list[int]) -> list[int]:
        """Rows of a batch whose samples are not there yet, each sample once."""
        first = {sample: row for row, sample in reversed(list(enumerate(samples)))}
        return sorted(row for sample, row in first.items() if self._shard[sample] == _NO_SHARD)

    def _positions(
        self, hidden_states: Mapping[int, Tensor], attention_mask: Tensor | None, samples: int
    ) -> tuple[Tensor, Tensor | None]:
        """How many positions of each sample are kept, int64 [b], and which are tokens, [b, S_b]; None: all."""
        if self.identity.pad_features == "include" or attention_mask is None:
            length = next((values.shape[1] for values in hidden_states.values()), 0)
            return torch.full((samples,), length, dtype=torch.int64), None
        is_token = attention_mask != 0
        ends = torch.arange(1, is_token.shape[1] + 1, device=is_token.device)
        return (is_token * ends).amax(dim=1).cpu(), is_token

    def _check_finite(self, index: Tensor, name: str, values: list[Tensor]) -> None:
        for sample, numbers in zip(index.tolist(), values, strict=True):
            if not bool(numbers.isfinite().all()):
                raise ValueError(
                    f"teacher_cache_dir: expected finite numbers, the teacher's {name} of training sample {sample} "
                    "have a NaN or Inf; nothing of its batch was written"
                )

    # ------------------------------------------------------------------------------------------ reading

    def read(
        self, sample_index: Tensor, positions: int | None = None, *, pin_memory: bool = False
    ) -> CachedBatch | None:
        """What the teacher computed for samples, in the layers that the run reads.

        Args:
            sample_index: Their indices, int64 ``[b]``, on the CPU; in any order, also twice.
            positions: L, at least the longest of them, which is the default.
            pin_memory: Whether the tensors lie in memory from which a GPU copies without waiting.

        Returns:
            Tensors on the CPU. None where a sample is not there, or was found damaged (with a warning): compute and
            write the batch again.
        """
        if not self.holds(sample_index):
            return None
        longest = int(self._length[sample_index].max())
        if positions is not None and positions < longest:
            raise ValueError(
                f"positions: expected at least the {longest} of the longest sample, got {positions}"
            )
        shape = (len(sample_index), longest if positions is None else positions, self.identity.hidden_size)
        logits = torch.empty(len(sample_index), self.identity.num_labels, pin_memory=pin_memory)
        states = {layer: torch.zeros(shape, dtype=self.dtype, pin_memory=pin_memory) for layer in self.layers}
        for place, sample in enumerate(sample_index.tolist()):
            found = self._sample(sample, self.layers)
            if found is None:
                return None
            logits[place] = found.logits
            for layer, values in found.hidden_states.items():
                states[layer][place, : len(values)] = values
        return CachedBatch(logits, states)

    def verify(self) -> Iterator[int]:
        """Compare every checksum; yield the samples as they are found to be whole. Damaged ones are no longer held."""
        order = (self._shard * self.identity.num_samples + self._row).argsort()
        for sample in order[self._shard[order] != _NO_SHARD].tolist():
            if self._sample(sample, self.identity.layers) is not None:
                yield sample

    def _sample(self, sample: int, layers: tuple[int, ...]) -> SampleValues | None:
        """Logits [C] and layers [length, D] of one sample; None where its bytes are damaged."""
        shard, row, start = int(self._shard[sample]), int(self._row[sample]), int(self._start[sample])
        end = start + int(self._length[sample])
        file = self._file(shard)
        if file is None:
            return None
        with self._damage_is_a_warning(self._paths[shard]):
            found = file.read(row, start, end, layers)
            self._check_bytes(sample, self._indices[shard].checksums[row], found)
            return found
        self._shard[sample] = _NO_SHARD
        return None

    def _file(self, shard: int) -> OpenShard | None:
        """A shard's file; None where it is damaged or gone: none of its samples is held any more."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        with self._damage_is_a_warning(self._paths[shard]):
            file = OpenShard(self._paths[shard], self.identity, self._indices[shard])
            self._open[shard] = file
            if len(self._open) > _MAXIMUM_OPEN:
                self._open.popitem(last=False)
            return file
        self._shard[self._shard == shard] = _NO_SHARD
        return None

    def _check_bytes(self, sample: int, checksums: Tensor, found: SampleValues) -> None:
        """Compare the checksums of a sample's values, each once."""
        columns = {0: found.logits}
        columns |= {
            1 + self.identity.layers.index(layer): values for layer, values in found.hidden_states.items()
        }
        for column, values in columns.items():
            if not self._checked[sample, column]:
                if crc32(values) != int(checksums[column]):
                    raise DamagedShard(f"the numbers of sample {sample} have another checksum")
                self._checked[sample, column] = True

    @contextmanager
    def _damage_is_a_warning(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (*TENSOR_ERRORS, DamagedShard) as error:
            warnings.warn(
                f"{path} is damaged ({shorten(str(error))}): its samples are computed again",
                RuntimeWarning,
                stacklevel=4,
            )


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat(follow_symlinks=False).st_mtime_ns, path.name
    except OSError:  # removed since it was listed
        return 0, path.name
