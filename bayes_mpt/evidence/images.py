"""Images of posterior draws under symmetries of the log joint, so that draws around one mode tell of all its images.

A mixture's components may change names, a factor its sign, and chains often stay in one labelling. Where a group of J
changes g of the latents keeps the log joint, p(g u) |dg / du| = p(u), a proposal q around the draws is made symmetric:

    q_sym(u) = 1/J sum over g of q(g u) |dg / du|

p / q_sym is the same at all images, and draws moved by random g would be draws of p: where modes lie apart, overlap or
are one, the integral comes out right, and no count of modes enters. A change over which the draws are spread already,
such as that of two labels between which chains go to and fro, is left out: it tells nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from bayes_mpt.predictors.nodes.resampling import weighted_root
from bayes_mpt.predictors.nodes.rules import degrees_of, log_t
from bayes_mpt.predictors.nodes.symmetries import (
    MAX_IMAGES,
    Coordinates,
    Moves,
    Symmetry,
    find_symmetries,
)

__all__ = ["Images", "Located", "changes_of", "group_of", "located"]

Array = NDArray[np.float64]

SPREAD = 0.5  # of the draws' density that their images share, from which on they are spread over these
MAX_WIDTH = 200  # latents, up to which symmetries are looked for
N_POINTS = 8  # of the draws, and as many far from them, at which the log joint is compared
FAR = 3.0  # standard deviations that are added to these
NUMBERS = 2**22  # of images, at a time
MAX_ROUNDS = 20


class Located(NamedTuple):
    """Where the draws are: mean and root of their covariance."""

    mean: Array
    """(d,)"""
    root: Array
    """(d, d) lower."""

    def log_q(self, u: Array) -> Array:
        """Log density (M,) at points (M, d) of the Student-t that stands there."""
        e = torch.as_tensor(np.linalg.solve(self.root, (u - self.mean).T).T)
        return log_t(e, degrees_of(len(self.mean))).numpy() - np.log(np.diag(self.root)).sum()


def located(u: Array) -> Located:
    """Of draws (M, d)."""
    points = torch.as_tensor(u)
    return Located(u.mean(0), weighted_root(points, points.new_full((len(u),), 1 / len(u))).numpy())


class Images(NamedTuple):
    """A group of J changes of unconstrained latents that keep the log joint."""

    where: Coordinates
    moves: Moves
    """J of them, the first of which moves nothing."""

    def __len__(self) -> int:
        return len(self.moves.order)

    def of(self, u: Array) -> tuple[Array, Array]:
        """Images (J, M, d) of points (M, d), and log |d image / du| (J, M); -inf where there is no image."""
        return _moved(self.where, self.moves, u)

    def mean_density(self, log_q: Callable[[Array], Array], u: Array) -> Array:
        """Log of q_sym (M,) at points (M, d), of the log density ``log_q`` (M,)."""
        found = [self._densities(log_q, part) for part in self._parts(u)]
        return np.concatenate([np.asarray(logsumexp(f, axis=0)) for f in found]) - np.log(len(self))

    def gathered(self, u: Array, first: int) -> tuple[Array, float]:
        """Draws (M, d), each moved to the image nearest to the others, from around the ``first`` of them.

        With it the mean share of q_sym that the other images have there: 0 where these lie apart.
        """
        image, log_det = self.of(u)
        known = np.isfinite(log_det)
        scale = np.concatenate(list(image))[known.ravel()].std(0) + 1e-300
        off = np.square((image - u[first]) / scale).sum(-1)
        chosen, at = np.where(known, off, np.inf).argmin(0), np.arange(len(u))
        for _ in range(MAX_ROUNDS):
            here = located(image[chosen, at])
            log_q = np.stack([here.log_q(each) for each in image]) + log_det
            log_q = np.where(known, log_q, -np.inf)
            best = log_q.argmax(0)
            if (best == chosen).all():
                break
            chosen = best
        share = np.exp(log_q - logsumexp(log_q, axis=0))[chosen, at]
        return image[chosen, at], float(1 - share.mean())

    def at_random(self, u: Array, rng: np.random.Generator) -> Array:
        """Draws (M, d), each moved by one of the changes at random."""
        image, log_det = self.of(u)
        which, at = rng.integers(len(self), size=len(u)), np.arange(len(u))
        return image[np.where(np.isfinite(log_det[which, at]), which, 0), at]

    def _densities(self, log_q: Callable[[Array], Array], u: Array) -> Array:
        image, log_det = self.of(u)
        flat = log_q(image.reshape(-1, u.shape[-1])).reshape(log_det.shape)
        return np.where(np.isfinite(log_det), flat + log_det, -np.inf)

    def _parts(self, u: Array) -> Iterator[Array]:
        at_once = max(1, NUMBERS // (len(self) * u.shape[-1]))
        yield from (u[i : i + at_once] for i in range(0, len(u), at_once))


def changes_of(
    log_prob: Callable[[Array], Array],
    where: Coordinates,
    u: Array,
    rng: np.random.Generator,
    apart: bool = False,
) -> list[Symmetry]:
    """Changes that keep the log joint, (M, d) -> (M,), and over which chains u (C, S, d) are not spread.

    Where chains are ``apart``, one that stays in its place is enough.
    """
    flat = u.reshape(-1, u.shape[-1])
    if where.width > MAX_WIDTH:
        return []
    some = flat[rng.choice(len(flat), N_POINTS, replace=False)]
    far = some + FAR * flat.std(0) * rng.normal(size=some.shape)

    def value(points: Tensor) -> Tensor:
        return torch.as_tensor(log_prob(points.numpy()))

    with torch.no_grad():
        found = find_symmetries(value, where, torch.as_tensor(np.concatenate([some, far])))
    together = [u[c : c + 1] for c in range(len(u))] if apart else [u]
    return [g for g in found if not all(_spread(where, g, chains) for chains in together)]


def group_of(where: Coordinates, changes: list[Symmetry]) -> Images | None:
    """All changes that these make together; None where they are more than 720."""
    found = [Symmetry(torch.arange(where.size), torch.ones(where.size))]
    known = {_key(found[0])}
    for element in found:  # grows meanwhile
        for g in changes:
            new = g.after(element)
            if _key(new) not in known:
                known.add(_key(new))
                found.append(new)
        if len(found) > MAX_IMAGES:
            return None
    return Images(where, Moves.of(found))


def _key(g: Symmetry) -> tuple[object, ...]:
    return (*g.order.tolist(), *g.sign.tolist())


def _moved(where: Coordinates, moves: Moves, u: Array) -> tuple[Array, Array]:
    with torch.no_grad():
        image, log_det = (t.numpy() for t in where.move(torch.as_tensor(u), moves))
    known = np.isfinite(image).all(-1) & np.isfinite(log_det)
    return np.where(known[..., None], image, u), np.where(known, log_det, -np.inf)


def _spread(where: Coordinates, g: Symmetry, u: Array) -> bool:
    """Whether draws (C, S, d) lie where their images lie, as a fit of their first halves tells it of the second."""
    half, d = u.shape[1] // 2, u.shape[-1]
    here, later = located(u[:, :half].reshape(-1, d)), u[:, half:].reshape(-1, d)
    image, log_det = _moved(where, Moves.of([g]), later)
    gain = here.log_q(image[0]) + log_det[0] - here.log_q(later)
    return bool(np.exp(np.minimum(gain, 0)).mean() >= SPREAD)
