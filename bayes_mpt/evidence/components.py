"""Components of P Gaussian mixtures given sums over the rows that each holds, and Gibbs steps of their allocations.

Rows are in units of the prior, less its centre. Sums may be of parts of rows. A Gibbs step draws the parameters given
the sums, which under a normal-inverse-Wishart prior, or normal-inverse-gamma, is a draw from a known law, then all
allocations and missing cells given the parameters: by products of matrices, all rows at once. `Dense` has full
covariances, or one that all components share; `Diagonal` variances, and no need to draw missing cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from bayes_mpt.evidence.mixture_prior import MixturePrior

__all__ = ["Block", "Components", "Dense", "Diagonal", "Step", "Sums", "blocks_of", "components"]

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Mask = NDArray[np.bool_]

LOG_PI = math.log(math.pi)
LOG_2PI = math.log(2 * math.pi)
MAX_CELLS = 2**20  # of particles x components x rows at a time


class Block(NamedTuple):
    """Rows that are read together."""

    position: Index
    """(n,) in the table, ascending."""
    seen: Mask
    """(T,) columns that they show; all, where each shows its own."""
    rows: Array
    """(n, d) these cells, zero where missing."""
    features: Array
    """(n, F): the log density of a normal is linear in them."""


class Sums(NamedTuple):
    """Over the rows of each component, P particles with K."""

    n: Array
    """(P, K) how many."""
    cells: Array
    """(P, K, T) how many."""
    x: Array
    """(P, K, T)"""
    xx: Array
    """(P, K, T, T) products of two columns, of `Diagonal` (P, K, T) squares."""
    log_hidden: Array
    """(P,) log density of the drawn missing cells given the others under the reference of `Step`."""

    def map(self, *others: Sums, by: Callable[..., Array]) -> Sums:
        """A function of each array."""
        return Sums(*(by(*arrays) for arrays in zip(self, *others, strict=True)))


class Watch(Protocol):
    """Is told of the allocations as they are drawn."""

    def __call__(self, rows: Index, probability: Array, one_hot: Array) -> None:
        """Of some rows (n,), each (P, K, n)."""


class Step(NamedTuple):
    """How allocations are drawn: in proportion to exp(pull) (weight density)^power."""

    power: float = 1.0
    pull: Callable[[Index], Array] | None = None
    """(P, K, n) of some rows (n,)."""
    watch: Watch | None = None
    reference: Components | None = None
    """Of M: at its expected parameters missing cells have a density to the power 1 - power."""
    origin: Index | None = None
    """(P,) which of the M."""


class Components(Protocol):
    """Of P particles."""

    def of(self, sums: Sums) -> Self:
        """What has seen rows with these sums."""

    def nothing(self) -> Sums:
        """Sums over no rows."""

    def log_marginal(self) -> Array:
        """(P,) log of the densities of allocations and rows, integrated over the parameters."""

    def redrawn(self, blocks: list[Block], rng: np.random.Generator, step: Step) -> Sums:
        """A Gibbs step: parameters, then allocations and missing cells."""

    def parameters(self, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        """Draws of weights (P, K), means (P, K, T) and covariances (P, K, T, T)."""


def components(prior: MixturePrior, kind: str, n_components: int, n_particles: int) -> Components:
    """Empty ones, in the prior's units."""
    law = Law(prior.kappa, prior.degrees, prior.concentration, prior.scale(kind, n_components))
    n, mean = np.zeros((n_particles, n_components)), np.zeros((n_particles, n_components, len(prior.center)))
    if kind in ("diag", "spherical"):
        scale = np.tile(law.scale, (*n.shape, 1))
        return Diagonal(law, n, mean, mean, scale)
    root = np.linalg.inv(np.linalg.cholesky(law.scale)).T  # inverse scale = root root'
    shape = (n_particles, 1 if kind == "tied" else n_components)
    return Dense(law, n, mean, np.tile(root, (*shape, 1, 1)), np.full(shape, law.log_det))


def blocks_of(rows: Array, kind: str) -> list[Block]:
    """Rows (N, T) as `redrawn` reads them: of dense covariances those that show the same columns together."""
    shown = ~np.isnan(rows)
    if kind in ("diag", "spherical"):
        x = np.where(shown, rows, 0.0)
        features = np.concatenate([x**2, x, shown], 1)
        return [Block(np.arange(len(rows)), np.ones(rows.shape[1], dtype=bool), x, features)]
    visible, pattern = np.unique(shown, axis=0, return_inverse=True)
    found = []
    for i, seen in enumerate(visible):
        position = np.flatnonzero(pattern.reshape(-1) == i)
        x = rows[position][:, seen]
        a, b = np.triu_indices(seen.sum())
        features = np.concatenate([x[:, a] * x[:, b], x, np.ones((len(x), 1))], 1)
        found.append(Block(position, seen, x, features))
    return found


class Law(NamedTuple):
    """The prior in its units."""

    kappa: float
    degrees: float
    concentration: float
    scale: Array

    @property
    def log_det(self) -> float:
        """Of a dense scale."""
        return float(np.linalg.slogdet(self.scale)[1])

    def log_allocations(self, n: Array) -> Array:
        """(P,) log probability of allocations with n (P, K) rows each."""
        a, k = self.concentration, n.shape[1]
        whole = gammaln(k * a) - gammaln(k * a + n.sum(1))
        return whole + (gammaln(a + n) - gammaln(a)).sum(1)

    def log_weights(self, n: Array, rng: np.random.Generator) -> Array:
        """(P, K) drawn given n, up to a common term."""
        return np.log(rng.standard_gamma(n + self.concentration))


@dataclass(eq=False)
class Dense:
    """Full covariances, or one that all components share."""

    law: Law
    n: Array
    """(P, K)"""
    mean: Array
    """(P, K, T)"""
    root: Array
    """(P, C, T, T), inverse scale = root root'; C = 1 where it is shared, else K."""
    log_det: Array
    """(P, C) of the scale."""

    @property
    def held(self) -> Array:
        """(P, C) rows that each scale has seen."""
        return self.n if self.root.shape[1] == self.n.shape[1] else self.n.sum(1, keepdims=True)

    def nothing(self) -> Sums:
        n, x, t = np.zeros_like(self.n), np.zeros_like(self.mean), self.mean.shape[2]
        return Sums(n, x, x, np.zeros((*x.shape, t)), np.zeros(len(n)))

    def of(self, sums: Sums) -> Self:
        mean = sums.x / (self.law.kappa + sums.n)[:, :, None]
        scatter = sums.xx - mean[:, :, :, None] * sums.x[:, :, None, :]  # (P, K, T, T)
        if self.root.shape[1] == 1:
            scatter = scatter.sum(1, keepdims=True)
        root, log_det = _root(self.law.scale + scatter)
        return replace(self, n=sums.n, mean=mean, root=root, log_det=log_det)

    def log_marginal(self) -> Array:
        law, t, n, held = self.law, self.mean.shape[2], self.n, self.held
        v, i = law.degrees + t - 1, np.arange(t)
        by_scale = (gammaln((v + held[..., None] - i) / 2) - gammaln((v - i) / 2)).sum(-1)
        by_scale += 0.5 * v * law.log_det - 0.5 * (v + held) * self.log_det
        by_mean = 0.5 * t * np.log(law.kappa / (law.kappa + n)) - 0.5 * t * LOG_PI * n
        return law.log_allocations(n) + by_scale.sum(1) + by_mean.sum(1)

    def redrawn(self, blocks: list[Block], rng: np.random.Generator, step: Step) -> Sums:
        log_weight = self.law.log_weights(self.n, rng)
        normals = self._normals(rng).to(step.power)
        n_particles, k, t = self.mean.shape
        x, xx = np.zeros_like(self.mean), np.zeros((n_particles, k, t, t))
        n, hidden = np.zeros((n_particles, k)), np.zeros(n_particles)
        a, b = np.triu_indices(t)
        reference = None
        if step.power < 1 and step.reference is not None:  # which is of the same kind
            reference = cast(Dense, step.reference).expected().taken(step.origin)
        for block in blocks:
            complete = block.seen.all()
            joint, hidden_part = normals, None
            if not complete:
                joint = normals if reference is None else normals.times(reference, 1 - step.power)
                hidden_part = joint.hidden(block.seen)
            coefficients = joint.marginal(block.seen, hidden_part)
            if not complete and reference is not None:
                own = reference.marginal(block.seen, reference.hidden(block.seen))
                coefficients = coefficients - (1 - step.power) * own
            for part, one_hot in _allocated(coefficients, block, log_weight, rng, step):
                n += one_hot.sum(2)
                if complete:
                    of_part = _sums(one_hot, block.features[part])
                    xx[:, :, a, b] += of_part[:, :, : len(a)]
                    x += of_part[:, :, len(a) : -1]
                else:
                    assert hidden_part is not None
                    full = hidden_part.completed(block.seen, block.rows[part], one_hot, rng)
                    if reference is not None:
                        hidden += reference.hidden(block.seen).log_density(full, block.seen, one_hot)
                    for c in range(k):
                        mine = full * one_hot[:, c, :, None]
                        x[:, c] += mine.sum(1)
                        xx[:, c] += mine.swapaxes(1, 2) @ full
        xx[:, :, b, a] = xx[:, :, a, b]
        return Sums(n, np.repeat(n[:, :, None], t, 2), x, xx, hidden)

    def parameters(self, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        weight = np.exp(self.law.log_weights(self.n, rng))
        precision, linear, _ = self._normals(rng)
        cov, _ = _inverse(precision)
        loc = _times(cov, linear)
        return weight / weight.sum(1, keepdims=True), loc, np.broadcast_to(cov, (*loc.shape, loc.shape[2]))

    def expected(self) -> _Normals:
        """At the expected precisions and means."""
        degrees = self.law.degrees + self.mean.shape[2] - 1 + self.held  # (P, C)
        root = np.sqrt(degrees)[:, :, None, None] * self.root
        log_det = self.mean.shape[2] * np.log(degrees) - self.log_det
        return _Normals.of(root, log_det, _times(root.swapaxes(2, 3), self.mean))

    def _normals(self, rng: np.random.Generator) -> _Normals:
        """Means and precisions of all components, drawn given the rows that they hold."""
        (n_particles, k, t), c = self.mean.shape, self.root.shape[1]
        degrees = self.law.degrees + t - 1 + self.held  # (P, C)
        bartlett = np.tril(rng.standard_normal((n_particles, c, t, t)), -1)
        i = np.arange(t)
        bartlett[:, :, i, i] = np.sqrt(rng.chisquare(degrees[:, :, None] - i))
        root = self.root @ bartlett  # precision = root root'
        log_det = 2 * np.log(bartlett[:, :, i, i]).sum(2) - self.log_det
        # loc = mean + root^-T e
        e = rng.standard_normal((n_particles, k, t)) / np.sqrt(self.law.kappa + self.n)[:, :, None]
        shifted = _times(root.swapaxes(2, 3), self.mean) + e  # root' loc
        return _Normals.of(root, log_det, shifted)


class _Normals(NamedTuple):
    """Log densities -1/2 x'Qx + l'x + c of P particles with K components, or powers of them."""

    precision: Array
    """(P, C, T, T) Q"""
    linear: Array
    """(P, K, T) l"""
    constant: Array
    """(P, K) c"""

    def to(self, power: float) -> _Normals:
        """Raised to a power."""
        return _Normals(*(power * a for a in self))

    @classmethod
    def of(cls, root: Array, log_det: Array, shifted: Array) -> _Normals:
        """With precision root root' (P, C, T, T) of this log determinant (P, C), and root' loc (P, K, T)."""
        constant = 0.5 * (log_det - root.shape[2] * LOG_2PI - np.square(shifted).sum(2))
        return cls(root @ root.swapaxes(2, 3), _times(root, shifted), constant)

    def taken(self, index: Index | None) -> _Normals:
        """Copies of some."""
        return self if index is None else _Normals(*(a[index] for a in self))

    def times(self, other: _Normals, power: float) -> _Normals:
        """Times a power of others."""
        return _Normals(*(a + power * b for a, b in zip(self, other, strict=True)))

    def hidden(self, seen: Mask) -> _Hidden:
        """Of the columns that are not seen, given those that are."""
        rows = self.precision[:, :, ~seen]
        back, log_det = _inverse(rows[:, :, :, ~seen])
        return _Hidden(back, log_det, -back @ rows[:, :, :, seen], _times(back, self.linear[:, :, ~seen]))

    def marginal(self, seen: Mask, hidden: _Hidden | None) -> Array:
        """(P, K, F) of the features of `Block`: the log density of the cells that are seen, the others integrated."""
        precision, linear, constant = self
        if hidden is not None:
            across = precision[:, :, seen][:, :, :, ~seen]  # (P, C, o, h)
            rest = (hidden.start * linear[:, :, ~seen]).sum(2) - hidden.log_det
            constant = constant + 0.5 * (rest + (~seen).sum() * LOG_2PI)
            linear = linear[:, :, seen] - _times(across, hidden.start)
            precision = precision[:, :, seen][:, :, :, seen] + across @ hidden.slope
        a, b = np.triu_indices(linear.shape[2])
        square = np.where(a == b, -0.5, -1.0) * precision[:, :, a, b]
        square = np.broadcast_to(square, (*constant.shape, len(a)))
        return np.concatenate([square, linear, constant[:, :, None]], 2)


class _Hidden(NamedTuple):
    """h cells given o others: normal around start + slope x_o."""

    cov: Array
    """(P, C, h, h)"""
    log_det: Array
    """(P, C) of the precision."""
    slope: Array
    """(P, C, h, o)"""
    start: Array
    """(P, K, h)"""

    def log_density(self, full: Array, seen: Mask, one_hot: Array) -> Array:
        """(P,) of the hidden cells of rows (P, n, T) of the components (P, K, n), added up."""
        precision, _ = _inverse(self.cov)
        found = 0.5 * (self.log_det - (~seen).sum() * LOG_2PI) * one_hot.sum(2)  # (P, K)
        for k in range(one_hot.shape[1]):
            s = min(k, self.cov.shape[1] - 1)
            expected = full[:, :, seen] @ self.slope[:, s].swapaxes(1, 2) + self.start[:, k, None]
            off = full[:, :, ~seen] - expected
            found[:, k] -= 0.5 * (((off @ precision[:, s]) * off).sum(2) * one_hot[:, k]).sum(1)
        return np.asarray(found.sum(1))

    def completed(self, seen: Mask, rows: Array, one_hot: Array, rng: np.random.Generator) -> Array:
        """Rows (n, o) of the components (P, K, n), hidden cells drawn given those seen: (P, n, T)."""
        root = np.linalg.cholesky(self.cov) if self.cov.shape[-1] > 1 else np.sqrt(self.cov)
        noise = rng.standard_normal((len(self.start), len(rows), self.start.shape[2]))
        hidden = np.zeros_like(noise)
        for k in range(self.start.shape[1]):
            s = min(k, root.shape[1] - 1)
            drawn = rows @ self.slope[:, s].swapaxes(1, 2) + noise @ root[:, s].swapaxes(1, 2)
            hidden += one_hot[:, k, :, None] * (drawn + self.start[:, k, None])
        full = np.empty((*noise.shape[:2], len(seen)))
        full[:, :, seen], full[:, :, ~seen] = rows, hidden
        return full


@dataclass(eq=False)
class Diagonal:
    """A variance for each column of each component, or one for each component."""

    law: Law
    n: Array
    """(P, K)"""
    count: Array
    """(P, K, T) cells."""
    mean: Array
    """(P, K, T)"""
    scale: Array
    """(P, K, C), C = T, or 1 of spherical components."""

    @property
    def own(self) -> bool:
        """Whether each column has a variance of its own."""
        return self.scale.shape[2] == self.mean.shape[2]

    @property
    def degrees(self) -> Array:
        """(P, K, C) of each variance."""
        return self.law.degrees + (self.count if self.own else self.count.sum(2, keepdims=True))

    def nothing(self) -> Sums:
        n, x = np.zeros_like(self.n), np.zeros_like(self.mean)
        return Sums(n, x, x, x, np.zeros(len(n)))

    def of(self, sums: Sums) -> Self:
        mean = sums.x / (self.law.kappa + sums.cells)
        grown = sums.xx - mean * sums.x
        scale = self.law.scale + (grown if self.own else grown.sum(2, keepdims=True))
        return replace(self, n=sums.n, count=sums.cells, mean=mean, scale=scale)

    def log_marginal(self) -> Array:
        law, v, cells = self.law, self.law.degrees, self.count
        by_scale = gammaln(self.degrees / 2) - gammaln(v / 2)
        by_scale += 0.5 * v * np.log(law.scale) - 0.5 * self.degrees * np.log(self.scale)
        by_mean = 0.5 * np.log(law.kappa / (law.kappa + cells)) - 0.5 * LOG_PI * cells
        return law.log_allocations(self.n) + by_scale.sum((1, 2)) + by_mean.sum((1, 2))

    def redrawn(self, blocks: list[Block], rng: np.random.Generator, step: Step) -> Sums:
        log_weight = self.law.log_weights(self.n, rng)
        (block,) = blocks
        t = self.mean.shape[2]
        loc, precision = self._normals(rng)
        constant = 0.5 * (np.log(precision) - LOG_2PI - precision * loc**2)
        coefficients = step.power * np.concatenate([-0.5 * precision, precision * loc, constant], 2)
        n, sums = np.zeros_like(self.n), np.zeros((*self.n.shape, 3 * t))
        for part, one_hot in _allocated(coefficients, block, log_weight, rng, step):
            n += one_hot.sum(2)
            sums += _sums(one_hot, block.features[part])
        xx, x, count = sums[:, :, :t], sums[:, :, t : 2 * t], sums[:, :, 2 * t :]
        return Sums(n, count, x, xx, np.zeros(len(n)))

    def parameters(self, rng: np.random.Generator) -> tuple[Array, Array, Array]:
        weight = np.exp(self.law.log_weights(self.n, rng))
        loc, precision = self._normals(rng)
        cov = np.eye(loc.shape[2]) / precision[:, :, None]
        return weight / weight.sum(1, keepdims=True), loc, cov

    def _normals(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """Means and precisions (P, K, T) of all components, drawn given the cells that they hold."""
        precision = rng.chisquare(self.degrees) / self.scale  # (P, K, C)
        spread = np.sqrt(precision * (self.law.kappa + self.count))
        loc = self.mean + rng.standard_normal(self.mean.shape) / spread
        return loc, np.broadcast_to(precision, loc.shape)


def _allocated(
    coefficients: Array, block: Block, log_weight: Array, rng: np.random.Generator, step: Step
) -> Iterator[tuple[slice, Array]]:
    """Which rows of a block, and one-hot (P, K, n) to which component each of them goes; some at a time."""
    n_particles, k, n_features = coefficients.shape
    flat = coefficients.reshape(-1, n_features)
    at_once = max(1, MAX_CELLS // len(flat))
    for start in range(0, len(block.position), at_once):
        part = slice(start, min(start + at_once, len(block.position)))
        rows = block.position[part]
        p = (flat @ block.features[part].T).reshape(n_particles, k, -1)
        p += step.power * log_weight[:, :, None]
        if step.pull is not None:
            p += step.pull(rows)
        p -= p.max(1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(1, keepdims=True)
        below = np.cumsum(p[:, :-1], 1)
        drawn = (below < rng.random((n_particles, 1, len(rows)))).sum(1)
        one_hot = (drawn[:, None] == np.arange(k)[:, None]).astype(float)
        if step.watch is not None:
            step.watch(rows, p, one_hot)
        yield part, one_hot


def _sums(one_hot: Array, features: Array) -> Array:
    """(P, K, F) features of the rows of each component, added up."""
    n_particles, k, n = one_hot.shape
    return (one_hot.reshape(-1, n) @ features).reshape(n_particles, k, -1)


def _times(matrix: Array, vector: Array) -> Array:
    """(P, C, S, T) times (P, K, T), C = K or 1."""
    if matrix.shape[1] == 1:
        return vector @ matrix[:, 0].swapaxes(1, 2)
    return np.einsum("pkij,pkj->pki", matrix, vector)


def _root(matrix: Array) -> tuple[Array, Array]:
    """R with R R' the inverse of symmetric positive definite ones (..., T, T), and their log determinants (...)."""
    lower = np.linalg.cholesky(matrix)
    log_det = 2 * np.log(np.diagonal(lower, axis1=-2, axis2=-1)).sum(-1)
    return np.linalg.inv(lower).swapaxes(-1, -2), log_det


def _inverse(matrix: Array) -> tuple[Array, Array]:
    """Of symmetric positive definite ones, and the log determinants of what was given."""
    if matrix.shape[-1] == 1:
        return 1 / matrix, np.log(matrix[..., 0, 0])
    root, log_det = _root(matrix)
    return root @ root.swapaxes(-1, -2), log_det
