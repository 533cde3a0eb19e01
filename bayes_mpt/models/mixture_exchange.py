"""A component exchanged for rows that no other explains, where starts were compared on some of many rows.

Of a cluster with few rows hardly any are among those some, and EM does not find it later: components do not leave the
rows that they have. All rows tell where one is wanted: those farthest from all components, in standard deviations of
the squared distance that their number of cells makes likely. A component with few rows is dropped and one of the
farthest rows put in its place (Ueda, Nakano, Ghahramani & Hinton 2000 exchange so by merging and splitting); whether
that is better is seen after some steps of EM, beside the mixture as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayes_mpt.models.covariance_prior import CovariancePrior
from bayes_mpt.models.gaussians import Gaussians
from bayes_mpt.models.left_out import Key, plain_shares, shares_of
from bayes_mpt.models.mixture_steps import Expect, coefficients_of, m_step

__all__ = ["STEPS", "exchanged"]

DROPPED = 3  # components that are tried, those with the fewest rows
FAR, FAR_A_TOKEN = 64, 4  # rows of which a new component is made: so many, and so many times the columns
STEPS = 8  # of EM, after which they are compared
SUCCESS = 0.01  # nats of all rows


def exchanged(
    expect: Expect, at: Gaussians, covariance_type: str, prior: CovariancePrior | None, *, gaps: bool
) -> Gaussians:
    """A mixture with one component exchanged, some steps of EM later, or the given one where none is better.

    Parameters
    ----------
    expect : Expect
        Of all rows.
    at : Gaussians
        A mixture.
    covariance_type : {"full", "tied", "diag", "spherical"}
    prior : CovariancePrior, optional
    gaps : bool
        As in `coefficients_of`.
    """
    n_components, n_tokens = at.loc.shape
    drop = at.weights.argsort()[: min(DROPPED, n_components)]
    many = Gaussians(*(part.expand(len(drop), *part.shape) for part in at))
    far = _Far()
    expect(many, coefficients_of(many, gaps=gaps), far)
    all_far = torch.cat([each.flatten() for each in far.rows.values()])
    n_far = min(max(FAR, FAR_A_TOKEN * n_tokens), len(all_far))
    least = float(all_far.topk(n_far).values[-1])
    sums, _ = expect(many, coefficients_of(many, gaps=gaps), _Instead(drop, far.rows, least))
    new, _ = m_step(sums, many, covariance_type, prior, 0.0)
    both = Gaussians(*(torch.cat([old[None], each]) for old, each in zip(at, new, strict=True)))
    value = both.weights[:, 0]
    for _ in range(STEPS):
        before = both
        sums, value = expect(both, coefficients_of(both, gaps=gaps))
        both, _ = m_step(sums, both, covariance_type, prior, 0.0)
        value = value if prior is None else value + prior.log_prob(before.scale)
    value = value.nan_to_num(nan=-math.inf)
    best = int(value.argmax())
    return both.take(best if float(value[best] - value[0]) > SUCCESS else 0)


class _Far:
    """Shares by the densities; how far rows are from the component that is nearest is kept."""

    def __init__(self) -> None:
        self.rows: dict[Key, Tensor] = {}
        """(n,)"""

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `bayes_mpt.models.left_out.Shares`."""
        # a sum of n squares has the mean n and the variance 2 n
        self.rows[key] = ((square()[0] - n_cells) / (2 * n_cells).clamp(min=1).sqrt()).amin(0)
        return plain_shares(key, log_prob, square, n_cells)


class _Instead:
    """Shares without one component in each of B mixtures, which has the farthest rows instead."""

    def __init__(self, drop: Tensor, far: dict[Key, Tensor], least: float):
        self.drop, self.far, self.least = drop, far, least

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `bayes_mpt.models.left_out.Shares`."""
        _, density = shares_of(log_prob)
        dropped = torch.nn.functional.one_hot(self.drop, log_prob.shape[1])[..., None].to(
            log_prob
        )  # (B, K, 1)
        rest, _ = shares_of(log_prob.masked_fill(dropped > 0, -math.inf))
        return torch.where(self.far[key] >= self.least, dropped, rest * (1 - dropped)), density
