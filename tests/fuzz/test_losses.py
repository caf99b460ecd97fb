"""Every loss on random shapes, masks, dtypes and strides, against the formulas in float64: value and gradient."""

import pytest
import torch

from fsd_fast.losses import GlobalInterFeatureLoss, IntraFeatureLoss, LocalInterFeatureLoss
from tests.fuzz.cases import fuzz

# dtype -> what a value and a gradient may differ by, relative to the largest entry.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}

# docs/losses.md says which vectors of different lengths have no cosine in the fast losses.
_APART = 300


def strided(tensor, generator):
    """The same numbers with other strides."""
    kind = generator.randrange(4)
    if kind == 0:
        return tensor
    if kind == 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return torch.cat([tensor[:1], tensor])[1:]


def features(generator, size, rows, width, random, dtype, scale):
    """Features as models make them, or rows of them equal, zero, or far from the origin."""
    values = scale * torch.randn(size, rows, width, generator=random, dtype=torch.float64)
    kind = generator.randrange(8)
    if kind == 0:
        values += 20 * scale * torch.randn(width, generator=random, dtype=torch.float64)
    if kind == 1:
        values[generator.randrange(size)] = 0
    if kind == 2:
        values[:] = values[:1, :1]
    if kind == 3 and size > 1:
        values[0] = values[-1]
    return values.to(dtype)


def lengths_apart(rows, centroids):
    """How many times longer the longest of these vectors is than the shortest that is not 0."""
    lengths = torch.cat(
        [torch.linalg.vector_norm(each.double().flatten(1), dim=1) for each in (rows, centroids)]
    )
    lengths = lengths[lengths > 0]
    return float(lengths.max() / lengths.min()) if len(lengths) else 1.0


def losses(pad_features, backend):
    options = {"pad_features": pad_features, "backend": backend}
    local, global_ = LocalInterFeatureLoss(**options), GlobalInterFeatureLoss(0.5, **options)
    return {
        "mean_log": lambda s, t, m, *_: IntraFeatureLoss("mean_log", **options)(s, t, m),
        "log_mean": lambda s, t, m, *_: IntraFeatureLoss("log_mean", **options)(s, t, m),
        "local": lambda s, t, m, *_: local(s, t, m),
        "global": lambda s, t, m, own, given: global_(s, own, t, given, m).loss,
    }


def value_and_gradients(loss, student, teacher, mask, own, given):
    student, own = student.clone().requires_grad_(), own.clone().requires_grad_()
    value = loss(student, teacher, mask, own, given)
    if not value.requires_grad:
        return value.double(), torch.zeros_like(student).double(), torch.zeros_like(own).double()
    value.backward()
    return (
        value.detach().double(),
        *(torch.zeros_like(x).double() if x.grad is None else x.grad.double() for x in (student, own)),
    )


def case(generator):
    random = torch.Generator().manual_seed(generator.randrange(2**31))
    size, rows, centroids = generator.randint(2, 9), generator.randint(1, 9), generator.randint(1, 6)
    widths = generator.randint(1, 12), generator.randint(1, 12)
    dtype = generator.choice(list(TOLERANCES))
    # A memory is of the size of its features.
    scales = [10 ** generator.uniform(-2, 2) for _ in widths]
    student, teacher = (
        features(generator, size, rows, width, random, dtype, scale)
        for width, scale in zip(widths, scales, strict=True)
    )
    own, given = (
        features(generator, centroids, rows, width, random, torch.float32, generator.uniform(0.2, 5) * scale)
        for width, scale in zip(widths, scales, strict=True)
    )
    own, given = own.flatten(1), given.flatten(1)
    mask = None
    pad_features = generator.choice(["include", "exclude"])
    if generator.random() < 0.7:
        mask = torch.rand(size, rows, generator=random) < 0.7
        mask = generator.choice([mask, mask.long(), mask.to(torch.int32)])
    name = generator.choice(["mean_log", "log_mean", "local", "global"])
    if dtype == torch.float64:
        own, given = own.double(), given.double()
    if name == "global" and max(lengths_apart(student, own), lengths_apart(teacher, given)) > _APART:
        return
    exact = [x.double() for x in (student, teacher, own, given)]
    expected = value_and_gradients(
        losses(pad_features, "reference")[name], exact[0], exact[1], mask, exact[2], exact[3]
    )
    placed = strided(student, generator), strided(teacher, generator)
    found = value_and_gradients(losses(pad_features, "eager")[name], *placed, mask, own, given)
    tolerance = TOLERANCES[dtype]
    where = (
        f"{name} {dtype} {pad_features} B={size} S={rows} D={widths} K={centroids} mask={mask is not None}"
    )
    for what, one, other in zip(("value", "gradient", "memory's gradient"), found, expected, strict=True):
        assert bool(one.isfinite().all()), f"{where}: {what} is not finite"
        error, largest = float((one - other).abs().max()), float(other.abs().max())
        # The losses do not depend on the scale of the features, or grow with it; where they are 0, so are gradients.
        rounding = 1e-6 * max(1.0, 1 / min(scales))
        assert error <= tolerance * largest + rounding, (
            f"{where}: {what} differs by {error:.2e} of {largest:.2e}"
        )


def test_losses_are_those_of_the_formulas_in_float64():
    fuzz("losses", case)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_check_sees_a_loss_that_is_off_by_one_percent(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, 6, generator=generator).to(dtype) for _ in range(2))
    loss = losses("include", "reference")["local"](student.double(), teacher.double(), None)
    assert abs(1.03 * loss - loss) > TOLERANCES[dtype] * loss + 1e-6
