"""The Gaussian factor likelihood of rows with missing cells, its slopes, a step of EM and the information.

At x ~ N(m, S), S = W W' + diag(psi), a row shows the tokens o. Rows are grouped by what they show (their pattern g):

    C_g = (I + W_o' diag(psi_o)^-1 W_o)^-1,    f_r = C_g W_o' diag(psi_o)^-1 (x_r - m)_o,    e_r = (x_r - m - W f_r)_o

    log p(x_r) = -1/2 [ n_o log 2 pi + sum_o log psi - log |C_g| + sum_o e_r^2 / psi + f_r' f_r ]

with sums of squares, in which nothing cancels where a noise is all but zero. With a_r = S_o^-1 (x_r - m)_o
= e_r / psi_o and Z_t the sum of C_g over the rows that show token t,

    d/dm = sum_r a_r,    d/dW = sum_r a_r f_r' - diag(psi)^-1 W_t Z_t,    d/dpsi_t = 1/2 sum_r [ a_rt^2 - (S_o^-1)_tt ]

Several maps are taken side by side, (B, ...): small algebra costs its calls and not its work. Rows stand last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Information", "Maps", "Patterns", "Slopes", "information", "inverse", "shares"]

Array = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)
SMALL = 1e-3  # noise, from which on down digits are looked after
CHUNK = 2**21  # numbers in one temporary


class Maps(NamedTuple):
    """Maps side by side."""

    mean: Array
    """(B, T) m."""
    loading: Array
    """(B, T, K) W."""
    noise: Array
    """(B, T) psi."""

    def some(self, which: NDArray[np.intp]) -> Maps:
        """Of these indices."""
        return Maps(*(part[which] for part in self))


class Slopes(NamedTuple):
    """The log likelihood of all rows and its slopes."""

    total: Array
    """(B,) nats."""
    mean: Array
    """(B, T)"""
    loading: Array
    """(B, T, K)"""
    noise: Array
    """(B, T)"""


class Information(NamedTuple):
    """Fisher information of all rows, given which cells they show; that of the mean stands apart."""

    mean: Array
    """(T, T) sum of S_o^-1."""
    loading: Array
    """(T, K, T, K)"""
    noise: Array
    """(T, T) of psi."""
    cross: Array
    """(T, K, T) of loadings and psi."""


class _Sums(NamedTuple):
    """What the slopes and the steps are made of."""

    total: Array
    a: Array
    """(B, T) sum_r a."""
    square: Array
    """(B, T) sum_r a^2."""
    af: Array
    """(B, T, K) sum_r a f'."""
    z: Array
    """(B, T, K, K) Z."""
    f: Array | None
    """(B, T, K) sum of f over the rows that show a token; with the next two only where a step is to be taken."""
    ff: Array | None
    """(B, T, K, K) of f f'."""
    first: Array | None
    """(B, K) sum of f over all rows."""
    second: Array | None
    """(B, K, K) sum of C + f f' over all rows."""


class Patterns:
    """Weighted rows (R, T), grouped by which cells they show."""

    def __init__(self, rows: Array, weight: Array):
        seen = ~np.isnan(rows)
        patterns, index = np.unique(seen, axis=0, return_inverse=True)
        order = np.argsort(index.ravel(), kind="stable")
        self.shown = patterns.T.astype(np.float64)
        """(T, G)"""
        self.index = index.ravel()[order]
        """(R,) which pattern."""
        self.seen = np.ascontiguousarray(seen[order].T, dtype=np.float64)
        """(T, R)"""
        self.rows = np.ascontiguousarray(np.where(seen, rows, 0.0)[order].T)
        """(T, R), zero where missing."""
        self.weight = weight[order]
        self.count = np.bincount(self.index, self.weight).astype(np.float64)
        """(G,) rows, weighted."""
        self.n_rows = float(weight.sum())
        self.n_seen = self.seen @ self.weight
        """(T,) observed cells."""

    def score(self, at: Maps) -> Array:
        """(B,) nats of all rows."""
        return self._sums(at, step=False).total

    def slopes(self, at: Maps) -> Slopes:
        """The score of all rows and its slopes."""
        return self._slopes(at, self._sums(at, step=False))

    def _slopes(self, at: Maps, sums: _Sums) -> Slopes:
        of_z = np.einsum("btk,btkl->btl", at.loading, sums.z)
        noise = at.noise
        own = (self.n_seen - (of_z * at.loading).sum(-1) / noise) / noise  # sum_r (S_o^-1)_tt
        loading = sums.af - of_z / noise[..., None]
        return Slopes(sums.total, sums.a, loading, 0.5 * (sums.square - own))

    def em(self, at: Maps) -> tuple[Array, Maps, Array]:
        """The score (B,) of maps, and the next step of EM in mean and loadings with the noise that it leaves.

        Returns
        -------
        score : (B,)
        moved : Maps
            Its noise is that of the likelihood.
        left : (B, T)
            Squares that are expected to be left, summed over the rows that show a token: psi is left / n_seen.

        Notes
        -----
        What is filled in is the latents: token by token a regression on (z, 1). With the latents' own mean and
        covariance estimated too, and then taken into W and m (Liu, Rubin & Wu 1998), which makes it faster.
        """
        sums = self._sums(at, step=True)
        assert sums.f is not None and sums.ff is not None
        assert sums.first is not None and sums.second is not None
        slope = self._slopes(at, sums)
        n_latents = at.loading.shape[-1]
        noise, seen = at.noise, np.broadcast_to(np.maximum(self.n_seen, 1e-300), at.noise.shape)
        moments = np.empty((*noise.shape, n_latents + 1, n_latents + 1))
        moments[..., :-1, :-1] = sums.ff + sums.z
        moments[..., -1, :-1] = moments[..., :-1, -1] = sums.f
        moments[..., -1, -1] = seen
        target = noise[..., None] * np.concatenate([slope.loading, slope.mean[..., None]], -1)
        change = np.linalg.solve(moments, target[..., None])[..., 0]  # (B, T, K + 1)
        left = seen * noise + 2 * noise**2 * slope.noise - (change * target).sum(-1)
        loading, mean = at.loading + change[..., :-1], at.mean + change[..., -1]
        first, second = sums.first / self.n_rows, sums.second / self.n_rows
        mean = mean + (loading @ first[..., None])[..., 0]
        root = np.linalg.cholesky(second - first[:, :, None] * first[:, None, :])
        return sums.total, Maps(mean, loading @ root, left / seen), left

    def information(self, at: Maps) -> Information:
        """Of one map (B = 1), per unit of m, W and psi."""
        return information(at.loading[0], at.noise[0], self.shown, self.count)

    def own_information(self, at: Maps) -> tuple[Array, Array, Array]:
        """The diagonals alone, of m (T,), W (T, K) and psi (T,), of which no matrix of tokens is made."""
        loading, noise = at.loading[0], at.noise[0]
        found = np.zeros_like(noise), np.zeros_like(loading), np.zeros_like(noise)
        for groups in _slices(self.shown.shape[1], max(1, CHUNK // max(1, loading.size))):
            shown, count = self.shown[:, groups].T, self.count[groups, None]
            uc, c = shares(loading, noise, shown)
            p = shown / noise - (uc * (shown[:, :, None] * (loading / noise[:, None]))).sum(2)  # (G, T)
            b = 1 - np.diagonal(c, axis1=1, axis2=2)  # (G, K)
            found[0][...] += (count * p).sum(0)
            found[1][...] += (count * p).T @ b + (count[:, :, None] * uc**2).sum(0)
            found[2][...] += 0.5 * (count * p**2).sum(0)
        return found

    def _sums(self, at: Maps, *, step: bool) -> _Sums:
        """Over all rows, by as many at once as fit into memory."""
        found: _Sums | None = None
        size = len(at.mean) * (self.shown.shape[0] + at.loading.shape[-1] ** 2)
        for groups, rows in self._parts(max(1, CHUNK // max(1, size))):
            part = self._sums_of(at, groups, rows, step=step)
            found = part if found is None else _added(found, part)
        assert found is not None
        return found

    def _parts(self, most: int) -> Iterator[tuple[slice, slice]]:
        """Groups and rows of them, in slices."""
        if len(self.index) <= most:
            yield slice(0, len(self.count)), slice(0, len(self.index))
            return
        for groups in _slices(len(self.count), most):
            start, end = np.searchsorted(self.index, [groups.start, groups.stop])
            for rows in _slices(end - start, most):
                yield (
                    slice(self.index[start + rows.start], self.index[start + rows.stop - 1] + 1),
                    slice(start + rows.start, start + rows.stop),
                )

    def _sums_of(self, at: Maps, groups: slice, rows: slice, *, step: bool) -> _Sums:
        b, t, k = at.loading.shape
        index, weight, seen = self.index[rows] - groups.start, self.weight[rows], self.seen[:, rows]
        shown = self.shown[:, groups]
        count = np.bincount(index, weight, minlength=shown.shape[1])
        scaled = at.loading / at.noise[..., None]
        outer = (scaled[..., :, None] * at.loading[..., None, :]).reshape(b, t, k * k)
        precision = (outer.swapaxes(1, 2) @ shown).reshape(b, k, k, shown.shape[1]) + np.eye(k)[:, :, None]
        c, log_det = inverse(precision)  # (B, K, K, G), (B, G)
        apart = (self.rows[:, rows] - at.mean[..., None]) * seen  # (B, T, R)
        f = scaled.swapaxes(1, 2) @ apart  # (B, K, R)
        f = (c[..., index] * f[:, None]).sum(2)
        rest = apart - (at.loading @ f) * seen
        if (
            k and at.noise.min() < SMALL
        ):  # what the inverse has lost where a noise is all but zero, by its residual
            missed = (c[..., index] * (scaled.swapaxes(1, 2) @ rest - f)[:, None]).sum(2)
            f, rest = f + missed, rest - (at.loading @ missed) * seen
        a = rest / at.noise[..., None]
        weighted = f * weight
        total = weight @ (seen.sum(0) * LOG_2PI) + np.log(at.noise) @ (seen @ weight) + log_det @ count
        total = total + (a * rest).sum(1) @ weight + (weighted * f).sum((1, 2))
        z = ((c * count).reshape(b, k * k, len(count)) @ shown.T).swapaxes(1, 2).reshape(b, t, k, k)
        found = _Sums(
            -0.5 * total, a @ weight, a**2 @ weight, a @ weighted.swapaxes(1, 2), z, None, None, None, None
        )
        if not step:
            return found
        ff = (weighted[:, :, None] * f[:, None]).reshape(b, k * k, len(weight))
        own = (c @ count) + ff.sum(-1).reshape(b, k, k)
        return found._replace(
            f=(weighted @ seen.T).swapaxes(1, 2),
            ff=(ff @ seen.T).swapaxes(1, 2).reshape(b, t, k, k),
            first=weighted.sum(-1),
            second=own,
        )


def information(loading: Array, noise: Array, shown: Array, count: Array) -> Information:
    """Fisher information at W (T, K) and psi (T,) of ``count`` (G,) rows for each pattern ``shown`` (T, G).

    With P = S_o^-1 in the places of o and zero elsewhere, A = P W and B = W' P W, summed over the rows,

        W_ik, W_jl: P_ij B_kl + A_il A_jk,    W_ik, psi_j: P_ij A_jk,    psi_i, psi_j: 1/2 P_ij^2,    m_i, m_j: P_ij
    """
    t, k = loading.shape
    info = Information(*(np.zeros(s) for s in ((t, t), (t, k, t, k), (t, t), (t, k, t))))
    for groups in _slices(shown.shape[1], max(1, CHUNK // (t * t + t * k))):
        some, n = shown[:, groups].T, count[groups]
        uc, c = shares(loading, noise, some)
        p = -uc @ (some[:, :, None] * (loading / noise[:, None])).swapaxes(1, 2)
        p[:, np.arange(t), np.arange(t)] += some / noise
        b = np.eye(k) - c  # W' P W = I - C
        weighted = n[:, None, None] * p
        info.mean[...] += weighted.sum(0)
        info.noise[...] += 0.5 * (weighted * p).sum(0)
        info.cross[...] += np.einsum("gij,gjk->ikj", weighted, uc)
        of_rows = uc.reshape(len(uc), t * k)
        flat = (n[:, None] * of_rows).T @ of_rows
        info.loading[...] += flat.reshape(t, k, t, k).transpose(0, 3, 2, 1)
        flat = weighted.reshape(len(p), t * t).T @ b.reshape(len(b), k * k)
        info.loading[...] += flat.reshape(t, t, k, k).transpose(0, 2, 1, 3)
    return info


def shares(loading: Array, noise: Array, shown: Array) -> tuple[Array, Array]:
    """psi^-1 W C (G, T, K) on the tokens ``shown`` (G, T), which is P W too, and C (G, K, K)."""
    t, k = loading.shape
    scaled = loading / noise[:, None]
    outer = (scaled[:, :, None] * loading[:, None, :]).reshape(t, -1)
    c, _ = inverse((shown @ outer).T.reshape(1, k, k, len(shown)) + np.eye(k)[:, :, None])
    c = np.ascontiguousarray(c[0].transpose(2, 0, 1))
    return shown[:, :, None] * scaled @ c, c


def _added(one: _Sums, other: _Sums) -> _Sums:
    return _Sums(*(None if a is None or b is None else a + b for a, b in zip(one, other, strict=True)))  # type: ignore[arg-type]


def inverse(matrix: Array) -> tuple[Array, Array]:
    """Inverses (B, K, K, G) of positive definite matrices that stand last, and the logarithms of their determinants.

    By elimination, all matrices at once: M -> M - M_i M_i' / M_ii, with row and column i those of the inverse.
    """
    k = matrix.shape[1]
    log_det = np.zeros((len(matrix), matrix.shape[-1]))
    matrix = matrix.copy()
    for i in range(k):
        pivot = matrix[:, i, i].copy()
        log_det += np.log(pivot)
        row, column = matrix[:, i] / pivot[:, None], matrix[:, :, i].copy()
        matrix -= column[:, :, None] * row[:, None]
        matrix[:, i], matrix[:, :, i] = row, -column / pivot[:, None]
        matrix[:, i, i] = 1 / pivot
    return matrix, log_det


def _slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]
