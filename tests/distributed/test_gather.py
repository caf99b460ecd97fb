"""Losses of the batch that several processes hold together: the values and gradients of one process with all of it."""

import pytest
import torch
from torch.nn.functional import pad

from fsd_fast.losses import (
    FeatureStructureLoss,
    GlobalInterFeatureLoss,
    IntraFeatureLoss,
    LocalInterFeatureLoss,
    RelationalLoss,
)
from fsd_fast.losses.gather import gather_features, sent_bytes
from tests.distributed.forked import in_processes

S, D_S, D_T, K = 6, 5, 7, 4
BATCHES = {2: [4, 4], 3: [3, 2, 1], 4: [2, 2, 2, 2]}


def batch(world, dtype, pad_features):
    """The joined batch, and the parts of the processes: each padded to its own longest sample under "exclude"."""
    generator = torch.Generator().manual_seed(world)
    sizes = BATCHES[world]
    total = sum(sizes)
    offset = 30 * torch.randn(D_S, generator=generator)
    student = torch.randn(total, S, D_S, generator=generator) + offset
    teacher = torch.randn(total, S, D_T, generator=generator)
    lengths = torch.randint(2, S + 1, (total,), generator=generator)
    lengths[0] = S
    mask = torch.arange(S) < lengths[:, None]
    memories = torch.randn(K, S * D_S, generator=generator), torch.randn(K, S * D_T, generator=generator)
    # Whatever a masked position holds must not matter.
    student[~mask] = torch.nan if pad_features == "exclude" else 1.0
    parts, first = [], 0
    for size in sizes:
        chosen = slice(first, first + size)
        longest = int(lengths[chosen].max()) if pad_features == "exclude" else S
        parts.append((student[chosen, :longest], teacher[chosen, :longest], mask[chosen, :longest]))
        first += size
    whole = (student, teacher, mask)
    cast = lambda rows: tuple(row.to(dtype) if row.is_floating_point() else row for row in rows)  # noqa: E731
    return cast(whole), [cast(part) for part in parts], cast(memories)


def losses(pad_features, backend):
    options = {"pad_features": pad_features, "backend": backend}
    local, intra = LocalInterFeatureLoss(**options), IntraFeatureLoss("log_mean", **options)
    global_ = GlobalInterFeatureLoss(0.3, **options)
    unbiased = LocalInterFeatureLoss(**options, estimator="unbiased")
    distance = LocalInterFeatureLoss(**options, measure="gram")
    relative = GlobalInterFeatureLoss(0.3, **options, distance_scale="mean")
    rkd = RelationalLoss(2.0, 3.0, **options)
    return {
        "unbiased L_L": lambda s, t, m, own, given: unbiased(s, t, m),
        "L_L of Gram matrices": lambda s, t, m, own, given: distance(s, t, m),
        "L_G of relative distances": lambda s, t, m, own, given: relative(s, own, t, given, m).loss,
        "RKD": lambda s, t, m, own, given: rkd(s, t, m).loss,
        "L_L": lambda s, t, m, own, given: local(s, t, m),
        "L_L of two layers": lambda s, t, m, own, given: local([s, s.roll(1, 2) - s], [t, t.roll(1, 2)], m),
        "L_G": lambda s, t, m, own, given: global_(s, own, t, given, m).loss,
        "L_I": lambda s, t, m, own, given: intra([s, s.roll(1, 2) - s], [t, t.roll(1, 2)], m),
    }, (local, intra, global_, unbiased, distance, relative, rkd)


def value_and_gradients(loss, part, memories):
    student, teacher, mask = part
    student = student.clone().requires_grad_()
    own = memories[0].clone().requires_grad_()
    value = loss(student, teacher, mask, own, memories[1])
    (3 * value).backward()
    memory = torch.zeros_like(own) if own.grad is None else own.grad
    return value.item(), student.grad, memory


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float64, "eager", 1e-10), (torch.float64, "reference", 1e-10), (torch.float32, "eager", 2e-5)],
)
@pytest.mark.parametrize("pad_features", ["include", "exclude"])
def test_values_and_gradients_are_those_of_the_joined_batch(
    tmp_path, world, dtype, backend, tolerance, pad_features
):
    whole, parts, memories = batch(world, torch.float64, pad_features)
    expected, _ = losses(pad_features, "reference")
    _, given_parts, given_memories = batch(world, dtype, pad_features)

    def work(rank):
        chosen, modules = losses(pad_features, backend)
        for module in modules:
            gather_features(module)
        results = {}
        for name, loss in chosen.items():
            value, student, memory = value_and_gradients(loss, given_parts[rank], given_memories)
            results[name] = value, student.numpy(), memory.numpy()
        return results

    found = in_processes(world, work, tmp_path)
    for name, loss in expected.items():
        value, student, memory = value_and_gradients(loss, whole, memories)
        first = 0
        for rank, part in enumerate(parts):
            own_value, own_student, _ = found[rank][name]
            assert own_value == pytest.approx(value, rel=tolerance), name
            size, longest = part[0].shape[:2]
            gradient = pad(torch.from_numpy(own_student).double(), (0, 0, 0, S - longest)) / world
            scale = float(student.abs().max())
            torch.testing.assert_close(
                gradient,
                student[first : first + size],
                rtol=tolerance,
                atol=tolerance * scale,
                msg=f"{name} {rank}",
            )
            first += size
        # What the wrapper does: the mean over the processes.
        mean = sum(torch.from_numpy(each[name][2]).double() for each in found) / world
        torch.testing.assert_close(
            mean, memory, rtol=tolerance, atol=tolerance * float(memory.abs().max() + 1e-12)
        )


def test_without_gathering_each_process_has_its_own(tmp_path):
    _, parts, _ = batch(2, torch.float64, "include")

    def work(rank):
        loss = LocalInterFeatureLoss()
        own = loss(*parts[rank]).item()
        gather_features(loss)
        return own, loss(*parts[rank]).item()

    (one, joined), (other, again) = in_processes(2, work, tmp_path)
    assert one != other
    assert joined == again
    assert joined != pytest.approx((one + other) / 2, rel=1e-3)


def test_one_sample_in_each_process_is_enough(tmp_path):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    logits, labels = torch.randn(2, 2, generator=generator), torch.tensor([0, 1])

    def work(rank):
        loss = FeatureStructureLoss("fsd_l")
        gather_features(loss)
        own = slice(rank, rank + 1)
        return (
            loss(logits[own], logits[own], labels[own], student[own], teacher[own])
            .components["loss_local"]
            .item()
        )

    found = in_processes(2, work, tmp_path)
    assert (
        found[0]
        == found[1]
        == pytest.approx(LocalInterFeatureLoss()(student, teacher).item(), rel=1e-5, abs=1e-6)
    )


def test_one_process_gathers_nothing():
    whole, _, _ = batch(2, torch.float32, "include")
    plain, gathered = LocalInterFeatureLoss(), LocalInterFeatureLoss()
    gather_features(gathered)
    assert torch.equal(plain(*whole), gathered(*whole))


def test_no_process_holds_all_features(tmp_path, monkeypatch):
    """What is exchanged and multiplied has the columns of one slice; what is sent is what the page says."""
    from fsd_fast.losses import gather

    width, size, world = 40, 4, 4
    student = torch.randn(size, 8, width // 8)

    def work(rank):
        shapes, sent = [], [0]
        original_gram, original_exchange = gather.gram, gather.dist.all_to_all_single

        def gram(rows, memory=None, **options):
            shapes.append(tuple(rows.shape))
            return original_gram(rows, memory, **options)

        def exchange(received, rows, *sizes):
            sent[0] += rows.numel() * rows.element_size() * (world - 1) // world
            return original_exchange(received, rows, *sizes)

        monkeypatch.setattr(gather, "gram", gram)
        monkeypatch.setattr(gather.dist, "all_to_all_single", exchange)
        loss = LocalInterFeatureLoss()
        gather_features(loss)
        loss(student.clone().requires_grad_(), student + 1).backward()
        return shapes, sent[0]

    for shapes, sent in in_processes(world, work, tmp_path):
        assert shapes == [(world * size, width // world)] * 2  # 8 positions among 4 processes
        side = world * size + 1
        sums = 2 * 2 * side * side * 8 * (world - 1) // world
        assert sent == sent_bytes(size, (width, width), world) - sums
