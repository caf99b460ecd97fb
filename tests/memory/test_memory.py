"""TeacherMemory and StudentMemory: what is clustered, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fsd_fast.memory import teacher_memory as memory
from fsd_fast.memory.features import FeatureBatch, MemoryIdentity, flatten_features
from fsd_fast.memory.student_memory import StudentMemory, cluster_means
from fsd_fast.memory.teacher_memory import TeacherMemory
from fsd_fast.models.fingerprint import model_fingerprint
from fsd_fast.untrusted import seal
from tests.tiny import memory_identity

S, D, K, N = 12, 16, 5, 70


def identity(**changes: object) -> MemoryIdentity:
    return memory_identity(S, D, K, **changes)


def samples() -> tuple[Tensor, Tensor]:
    """Features in five loose groups ``[N, S, D]`` and their masks ``[N, S]``."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(K, (N,), generator=generator)
    features = 3 * torch.randn(K, S, D, generator=generator)[group] + torch.randn(
        N, S, D, generator=generator
    )
    lengths = torch.randint(3, S + 1, (N,), generator=generator)
    return features, (torch.arange(S)[None] < lengths[:, None]).long()


def batches(
    features: Tensor, mask: Tensor | None, *, trim: bool = False
) -> Callable[[int], Iterator[FeatureBatch]]:
    """Ragged batches of 16; with ``trim`` padded only to their own longest sample."""

    def read(start: int = 0) -> Iterator[FeatureBatch]:
        for index in torch.arange(features.shape[0]).split(16)[start:]:
            length = int(mask[index].sum(1).max()) if trim and mask is not None else features.shape[1]
            own = None if mask is None else mask[index, :length]
            yield FeatureBatch(features[index, :length], own, index)

    return read


@pytest.fixture(scope="module")
def built() -> TeacherMemory:
    features, mask = samples()
    return TeacherMemory.build(batches(features, mask), identity(), seed=3, progress=False, num_samples=N)


# --- building -------------------------------------------------------------------------------------------------


def test_build_finds_the_groups(built: TeacherMemory) -> None:
    features, _ = samples()
    flat = features.flatten(1).double()
    assert built.centroids.shape == (K, S * D)
    assert built.centroids.dtype == torch.float32
    labels = torch.cdist(flat, built.centroids.double()).argmin(1)
    assert torch.equal(labels, built.labels)
    assert labels.bincount(minlength=K).tolist() == built.cluster_sizes
    assert sum(built.cluster_sizes) == built.num_samples == N
    assert built.inertia == pytest.approx(
        float((flat - built.centroids.double()[labels]).square().sum()), rel=1e-6
    )
    # Groups of unit noise: S*D per sample, less what the K means take up.
    assert built.inertia == pytest.approx((N - K) * S * D, rel=0.05)
    assert set(built.seconds) == {"pass_1", "sketch_clustering", "pass_2"}
    assert built.settings == {"algorithm": "sketch", "sketch_width": 2048, "restarts": 4, "refine": 0}


def test_build_is_repeatable() -> None:
    features, mask = samples()
    runs = [
        TeacherMemory.build(batches(features, mask), identity(), seed=1, sketch_width=64, progress=False)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].centroids, runs[1].centroids)


def test_excluded_padding_never_counts() -> None:
    features, mask = samples()
    excluded = identity(pad_features="exclude")
    expected = TeacherMemory.build(
        batches(features * mask[:, :, None], None), excluded, seed=0, progress=False
    )
    dirty = features.masked_fill(mask[:, :, None] == 0, float("nan"))
    for trim in (False, True):
        found = TeacherMemory.build(batches(dirty, mask, trim=trim), excluded, seed=0, progress=False)
        torch.testing.assert_close(found.centroids, expected.centroids)
        assert found.cluster_sizes == expected.cluster_sizes
        assert found.inertia == pytest.approx(expected.inertia, rel=1e-6)
    included = TeacherMemory.build(batches(features, mask), identity(), seed=0, progress=False)
    assert not torch.allclose(included.centroids, expected.centroids)


def test_lloyd_clusters_without_a_sketch() -> None:
    features, mask = samples()
    flat = (features * mask[:, :, None]).flatten(1).double()
    dirty = features.masked_fill(mask[:, :, None] == 0, float("nan"))
    for trim in (False, True):
        found = TeacherMemory.build(
            batches(dirty, mask, trim=trim),
            identity(pad_features="exclude"),
            seed=0,
            algorithm="lloyd",
            progress=False,
            num_samples=N,
        )
        labels = torch.cdist(flat, found.centroids.double()).argmin(1)
        assert found.labels.tolist() == labels.tolist()
        assert found.sample_index.tolist() == list(range(N))
        assert labels.bincount(minlength=K).tolist() == found.cluster_sizes
        for cluster in range(K):
            torch.testing.assert_close(
                found.centroids[cluster].double(), flat[labels == cluster].mean(0), rtol=1e-5, atol=1e-5
            )
        own = found.centroids.double()[labels]
        assert found.inertia == pytest.approx(float((flat - own).square().sum()), rel=1e-5)
        assert found.settings == {"algorithm": "lloyd"}
        assert {epoch["stage"] for epoch in found.epoch_stats} == {"exact"}
        assert found.teacher_passes > 2
    for arguments, message in (
        ({"algorithm": "elkan"}, "algorithm: expected one of sketch, lloyd"),
        ({"algorithm": "lloyd", "refine": 1}, "refine: every epoch is exact"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherMemory.build(batches(features, mask), identity(), seed=0, progress=False, **arguments)


def test_refine_lowers_the_inertia_of_a_coarse_sketch() -> None:
    features, mask = samples()
    coarse, refined = (
        TeacherMemory.build(
            batches(features, mask),
            identity(),
            seed=0,
            sketch_width=2,
            restarts=1,
            refine=refine,
            progress=False,
        )
        for refine in (0, 3)
    )
    assert refined.inertia < 0.95 * coarse.inertia
    assert "refine" in refined.seconds


def test_progress_counts_samples(capsys: pytest.CaptureFixture[str]) -> None:
    features, mask = samples()
    TeacherMemory.build(batches(features, mask), identity(), seed=0, num_samples=N)
    shown = capsys.readouterr().err
    assert "memory: pass 1" in shown
    assert "memory: pass 2" in shown
    assert f"{N}/{N}" in shown
    assert "memory: sketch clustering: 100%" in shown
    assert "4/4" in shown


def test_bad_features_are_refused() -> None:
    features, mask = samples()
    poisoned = features.clone()
    poisoned[37, 2, 3] = float("inf")

    def build(of: Callable[[int], Iterator[FeatureBatch]], run: MemoryIdentity, **more: int) -> None:
        TeacherMemory.build(of, run, seed=0, progress=False, **more)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="sample 37 has a NaN or infinite feature"):
        build(batches(poisoned, mask), identity())
    with pytest.raises(ValueError, match="70 samples are fewer than the 71 clusters"):
        build(batches(features, mask), identity(num_centroid=71))
    with pytest.raises(ValueError, match="num_samples: expected 69 samples, the batches held 70"):
        build(batches(features, mask), identity(), num_samples=69)
    with pytest.raises(ValueError, match="12 positions, expected exactly max_seq_length = 20"):
        build(batches(features, mask), identity(max_seq_length=20))
    with pytest.raises(ValueError, match="12 positions, expected at most max_seq_length = 8"):
        build(batches(features, mask), identity(max_seq_length=8, pad_features="exclude"))
    with pytest.raises(ValueError, match=r"D = 8, got \[16, 12, 16\]"):
        build(batches(features, mask), identity(hidden_size=8))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[b, S\] = \[2, 12\], got \[2, 11\]"):
        flatten_features(
            FeatureBatch(features[:2], mask[:2, :11], torch.arange(2)), identity(pad_features="exclude")
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine": -1}, "refine: expected at least 0, got -1"),
        ({"restarts": 0}, "restarts: expected at least 1, got 0"),
        ({"sketch_width": 0}, "sketch_width: expected at least 1, got 0"),
        ({"algorithm": "lloyd", "refine": -1}, "refine: every epoch is exact .* expected 0, got -1"),
        ({"save_every": 0}, "save_every: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_a_batch_is_made(arguments: dict[str, Any], message: str) -> None:
    def read(start: int) -> Iterator[FeatureBatch]:
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(ValueError, match=message):
        TeacherMemory.build(read, identity(), seed=0, progress=False, **arguments)


def test_features_too_large_for_float32_squares_are_refused() -> None:
    features, mask = samples()
    features[41, 2, 3] = 1e19
    with pytest.raises(ValueError, match=r"sample 41 has features as large as 1e\+19: expected a norm"):
        TeacherMemory.build(batches(features, mask), identity(), seed=0, progress=False)


def test_identity_is_checked() -> None:
    with pytest.raises(ValueError, match="pad_features: expected one of include, exclude, got 'drop'"):
        identity(pad_features="drop")
    with pytest.raises(ValueError, match="num_centroid: expected at least 1, got 0"):
        identity(num_centroid=0)


# --- files ----------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(built: TeacherMemory, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path / "new" / "memory")
    loaded = TeacherMemory.from_pretrained(tmp_path / "new" / "memory", identity())
    for item in dataclasses.fields(TeacherMemory):
        found, expected = getattr(loaded, item.name), getattr(built, item.name)
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected, item.name
    assert sorted(path.name for path in (tmp_path / "new" / "memory").iterdir()) == [
        "memory.json",
        "memory.safetensors",
    ]


def test_a_memory_of_another_run_is_refused_field_by_field(built: TeacherMemory, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as caught:
        TeacherMemory.from_pretrained(tmp_path, identity(layer=6, pad_features="exclude"))
    message = str(caught.value)
    assert "layer is 5, expected 6" in message
    assert "pad_features is 'include', expected 'exclude'" in message
    assert "task_name" not in message
    # A moved teacher is the same teacher: its fingerprint tells.
    TeacherMemory.from_pretrained(tmp_path, identity(teacher="elsewhere"))
    for item in dataclasses.fields(MemoryIdentity):
        if item.name == "teacher":
            continue
        other = {"str": "exclude", "int": 99}[str(item.type)]
        with pytest.raises(ValueError, match=f"{item.name} is .*, expected {other!r}"):
            TeacherMemory.from_pretrained(tmp_path, identity(**{item.name: other}))


@pytest.mark.parametrize("name", ["memory.json", "memory.safetensors"])
def test_a_missing_file_is_named(built: TeacherMemory, tmp_path: Path, name: str) -> None:
    built.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TeacherMemory.from_pretrained(tmp_path)


def test_damaged_files_are_refused(built: TeacherMemory, tmp_path: Path) -> None:
    values, metadata = tmp_path / "memory.safetensors", tmp_path / "memory.json"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TeacherMemory.from_pretrained(tmp_path)

    built.save_pretrained(tmp_path)
    content = bytearray(values.read_bytes())
    content[-1] ^= 1
    values.write_bytes(content)
    refused("memory.safetensors: its sha256 is not the one")
    values.write_bytes(content[:100])
    refused("memory.safetensors: its sha256 is not the one")

    built.save_pretrained(tmp_path)
    text = metadata.read_text()
    metadata.write_text(text[: len(text) // 2])
    refused("memory.json: not a JSON file")
    metadata.write_text("{}")
    refused("memory.json: expected a memory of format 3")
    record = json.loads(text)
    del record["inertia"]
    metadata.write_text(json.dumps(record))
    refused("fields are missing: inertia")
    record = json.loads(text)
    record["cluster_sizes"][0] += 1
    metadata.write_text(json.dumps(record))
    refused("cluster sizes that add up to 70, got 5 that add up to 71")
    record = json.loads(text)
    record["identity"]["owner"] = "x"
    metadata.write_text(json.dumps(record))
    refused("memory.json: identity: unknown fields: 'owner'")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "centroids",
            lambda centroids: centroids[:, :-1].contiguous(),
            r"expected centroids float32 \[5, 192\], got .*\[5, 191\]",
        ),
        ("centroids", lambda centroids: centroids.double(), "got torch.float64"),
        ("centroids", lambda centroids: centroids / 0, "NaN or infinite"),
        (
            "labels",
            lambda labels: labels[:-1].clone(),
            r"expected labels int64 \[70\], got torch.int64 \[69\]",
        ),
        ("labels", lambda labels: labels.float(), "got torch.float32"),
        ("labels", lambda labels: labels - 1, "expected labels with the cluster sizes"),
        ("labels", lambda labels: labels + K, "expected labels with the cluster sizes"),
        ("labels", lambda labels: labels.roll(1) * 0, "expected labels with the cluster sizes"),
        ("sample_index", lambda index: index.flip(0), "expected sample_index to rise from 0 or more"),
        ("sample_index", lambda index: index - 1, "expected sample_index to rise from 0 or more"),
    ],
)
def test_tensors_are_checked_beyond_the_hash(
    built: TeacherMemory, tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    dataclasses.replace(built, **{name: change(getattr(built, name))}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        TeacherMemory.from_pretrained(tmp_path)


def test_a_file_without_centroids_is_refused(built: TeacherMemory, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path)
    values, metadata = tmp_path / "memory.safetensors", tmp_path / "memory.json"
    save_file({"other": torch.ones(2)}, values)
    record = json.loads(metadata.read_text())
    del record["checksum"]
    record["sha256"] = memory.hashlib.sha256(values.read_bytes()).hexdigest()
    metadata.write_text(json.dumps(seal(record)))
    with pytest.raises(ValueError, match="got nothing"):
        TeacherMemory.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_no_pair_that_loads(
    built: TeacherMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.save_pretrained(tmp_path)
    other = dataclasses.replace(built, centroids=built.centroids + 1)
    replace, calls = memory.os.replace, []

    def fail_at(call: int) -> Callable[[str, Path], None]:
        def replacing(source: str, target: Path) -> None:
            calls.append(target)
            if len(calls) == call:
                raise OSError("disk full")
            replace(source, target)

        return replacing

    monkeypatch.setattr(memory.os, "replace", fail_at(1))
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path)
    # Nothing has happened yet: the old memory is whole.
    assert torch.equal(TeacherMemory.from_pretrained(tmp_path).centroids, built.centroids)
    calls.clear()
    monkeypatch.setattr(memory.os, "replace", fail_at(2))
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="interrupted"):
        TeacherMemory.from_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file stays behind


# --- fingerprint and student memory -----------------------------------------------------------------------------


def test_fingerprint_changes_with_any_parameter_only() -> None:
    def model() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.5)
        return net

    first = model_fingerprint(model())
    assert len(first) == 64
    assert model_fingerprint(model().eval()) == first
    for name, _ in model().named_parameters():
        changed = model()
        parameter = changed.get_parameter(name)
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-6
        assert model_fingerprint(changed) != first
    assert model_fingerprint(model().bfloat16()) != first
    assert model_fingerprint(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(4))) != first


def test_student_memory_starts_normal() -> None:
    before = torch.random.get_rng_state()
    student = StudentMemory(40, 8, 24)
    assert isinstance(student.centroids, nn.Parameter)
    assert student.centroids.shape == (40, 8 * 24)
    assert list(student.state_dict()) == ["centroids"]
    values = student.centroids.detach()
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05
    assert float(StudentMemory(40, 8, 24, std=0.02).centroids.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(student.centroids, StudentMemory(40, 8, 24).centroids)
    other = StudentMemory(40, 8, 24, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(student.centroids, other.centroids)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_student_memory_starts_from_the_teacher(built: TeacherMemory) -> None:
    student = StudentMemory(K, S, D, "teacher", teacher_memory=built)
    assert torch.equal(student.centroids, built.centroids)
    with torch.no_grad():
        student.centroids += 1
    assert not torch.equal(student.centroids, built.centroids)  # a copy
    with pytest.raises(ValueError, match=r"\[5, 192\]; init = 'teacher' needs \[K, S\*D\] = \[5, 96\]"):
        StudentMemory(K, S, D // 2, "teacher", teacher_memory=built)
    with pytest.raises(ValueError, match="needs the teacher's memory, got None"):
        StudentMemory(K, S, D, "teacher")
    with pytest.raises(ValueError, match="init: expected 'normal', 'teacher' or centroids, got 'zeros'"):
        StudentMemory(K, S, D, "zeros")


def student_samples(width: int) -> Tensor:
    """Features ``[N, S, width]`` of a student, whose scale and mean are not the teacher's."""
    return 5 + 3 * torch.randn(N, S, width, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("pad_features", ["include", "exclude"])
def test_student_memory_starts_as_the_means_of_the_teachers_clusters(pad_features: str) -> None:
    features, mask = samples()
    policy = identity(pad_features=pad_features)
    teacher = TeacherMemory.build(batches(features, mask), policy, seed=0, progress=False)
    own = student_samples(7)
    found = cluster_means(batches(own, mask)(), teacher, 7)
    counted = own if pad_features == "include" else own * mask[:, :, None]
    expected = [counted[teacher.labels == k].double().mean(0).flatten() for k in range(K)]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
    student = StudentMemory(K, S, 7, found)
    assert torch.equal(student.centroids, found)
    assert student.centroids.data_ptr() != found.data_ptr()


def test_student_memory_of_an_empty_cluster_is_that_of_the_largest(built: TeacherMemory) -> None:
    labels = built.labels.clamp(min=1)
    sizes = labels.bincount(minlength=K)
    memory = dataclasses.replace(built, labels=labels, cluster_sizes=sizes.tolist())
    found = cluster_means(batches(student_samples(7), None)(), memory, 7)
    assert torch.equal(found[0], found[int(sizes.argmax())])


def test_student_memory_of_other_samples_is_refused(built: TeacherMemory) -> None:
    with pytest.raises(ValueError, match=r"init: expected centroids \[K, S\*D\] = \[5, 96\], got \[5, 192\]"):
        StudentMemory(K, S, D // 2, built.centroids)
    own = student_samples(7)
    with pytest.raises(ValueError, match="training sample 70 was not among those it was built on"):
        cluster_means(batches(torch.cat([own, own]), None)(), built, 7)
    with pytest.raises(ValueError, match="built on 70 samples, the student's features are of 69"):
        cluster_means(batches(own[:-1], None)(), built, 7)
    odd = dataclasses.replace(built, sample_index=2 * built.sample_index)
    with pytest.raises(ValueError, match="training sample 1 was not among"):
        cluster_means(batches(own, None)(), odd, 7)


def test_files_hold_plain_tensors_only(built: TeacherMemory, tmp_path: Path) -> None:
    built.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "memory.safetensors")) == ["centroids", "labels", "sample_index"]
