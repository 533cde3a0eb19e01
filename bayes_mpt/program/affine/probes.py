"""Values of the latents at which a program is run, and the affine map through what it answers."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm, NotAffine
from bayes_mpt.program.program import ModelError, list_names

__all__ = [
    "affine_through",
    "check_affine",
    "check_constant",
    "close",
    "probes_of",
    "random_points",
    "tolerance",
]

N_CHECKS = (
    4  # random points on top of the K + 1 that fix the affine map: at 1, 10 and 100 sd, and opposite the last
)
AFFINE_TOL = 1e-9


def probes_of(structure: AffineForm, like: Tensor, further: Tensor | None = None) -> Tensor:
    """(K + 5, K): zeros, the unit vectors, and four random points, in units of the prior's spread.

    With ``further`` points (P, K) those instead of the random ones.
    """
    spread = structure.spread.to(like)
    unit = torch.diag(spread)
    others = random_points(spread) if further is None else further.to(unit)
    return torch.cat([unit.new_zeros(1, len(spread)), unit, others])


def random_points(spread: Tensor) -> Tensor:
    """(4, K): 1, 10 and 100 standard deviations (K,) away, and on the other side: a kink may be on one alone."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(N_CHECKS - 1, len(spread), generator=generator, dtype=torch.float64).to(spread)
    far = random * torch.tensor([1.0, 10.0, 100.0]).to(spread)[:, None] * spread
    return torch.cat([far, -far[-1:]])


def affine_through(y: Tensor, probes: Tensor, structure: AffineForm, where: str) -> tuple[Tensor, Tensor]:
    """y (P, B, D) at the probes (P, K) -> intercept (B, D) and slope (B, D, K), checked at the random points."""
    n_latents = probes.shape[1]
    intercept = y[0]
    # slope_k = (y(e_k) - y(0)) / spread_k
    slope = (y[1 : n_latents + 1] - intercept) / structure.spread.to(y)[:, None, None]
    slope = slope.permute(1, 2, 0)
    with torch.no_grad():
        far = probes[n_latents + 1 :]
        want = intercept + (slope @ far.mT).permute(2, 0, 1)
        size = (slope.abs() @ far.abs().mT).permute(2, 0, 1) + intercept.abs()
        check_affine(y[n_latents + 1 :], want, size, structure, where, bool(torch.isfinite(y).all()))
    return intercept, slope


def check_affine(
    got: Tensor, want: Tensor, size: Tensor, structure: AffineForm, where: str, finite: bool = True
) -> None:
    """Means at random points (P, ...) must be what the map says, up to rounding in parts of this size."""
    finite = finite and bool(torch.isfinite(got).all())
    size = size + size.amax(0) if len(size) else size
    if finite and bool(((got - want).abs() <= tolerance(got) * size).all()):
        return
    broken = [n for n, p in pyro.get_param_store().items() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ModelError(f"parameter {broken[0]!r} is not finite: check its initial value and constraint")
    what = "is not affine in the latents" if finite else "is not finite"
    raise NotAffine(
        f"the mean of the {where} {what} {list_names(structure.latent_names)}: this program is not linear-Gaussian, "
        "so its score has no closed form"
    )


def check_constant(scale: Tensor, where: str) -> None:
    """scale (P, ...): the same at all probes, or the variance depends on the latents."""
    with torch.no_grad():
        if not close(scale, scale[:1].expand_as(scale)):
            raise NotAffine(
                f"the scale of the {where} depends on the latents: this program is not linear-Gaussian, so its "
                "score has no closed form"
            )


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if a.shape != b.shape and a.shape[1:] != b.shape[1:]:
        return False
    a, b = a.detach(), b.detach()
    return torch.equal(a, b) or bool(((a - b).abs() <= tolerance(a) * (a.abs() + b.abs())).all())


def tolerance(like: Tensor) -> float:
    """Relative error that rounding explains, in the precision of a tensor."""
    return AFFINE_TOL if like.dtype == torch.float64 else 1e-4
