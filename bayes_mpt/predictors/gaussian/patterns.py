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
from collections.abc import Callable, Iterator
from functools import partial
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
        both = np.concatenate([np.where(seen, rows, 0.0)[order].T, seen[order].T])
        self.both = np.ascontiguousarray(both)
        """(2 T, R) rows, zero where missing, and what they show."""
        self.rows, self.seen = np.split(self.both, 2)
        self.weight = weight[order]
        self.count = np.bincount(self.index, self.weight).astype(np.float64)
        """(G,) rows, weighted."""
        self.n_rows = float(weight.sum())
        self.n_seen, self.first, self.square = _moments(self.both, self.weight)
        """(T,) observed cells, their sums and those of their squares."""

    def score(self, at: Maps) -> Array:
        """(B,) nats of all rows."""
        return self._sums(at, partial(self._by_residuals, step=False)).total

    def slopes(self, at: Maps) -> Slopes:
        """The score of all rows and its slopes."""
        return self._slopes(at, self._sums(at, partial(self._by_residuals, step=False)))

    def quick_slopes(self, at: Maps, rough: bool) -> Slopes:
        """The same in less time, with digits enough for a sampler; ``rough``: five of them."""
        if at.noise.min() < SMALL:
            return self.slopes(at)
        return self._slopes(at, self._sums(at, partial(self._by_products, rough=rough)))

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
        sums = self._sums(at, partial(self._by_residuals, step=True))
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

    def _sums(self, at: Maps, of: Callable[[Maps, slice, slice], _Sums]) -> _Sums:
        """Over all rows, by as many at once as fit into memory."""
        found: _Sums | None = None
        size = len(at.mean) * (self.shown.shape[0] + at.loading.shape[-1] ** 2)
        for groups, rows in self._parts(max(1, CHUNK // max(1, size))):
            part = of(at, groups, rows)
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

    def _by_products(self, at: Maps, groups: slice, rows: slice, *, rough: bool) -> _Sums:
        """Without any number for each row and token: products of constant matrices (T, R) with latents (K, R).

        With u_r = (x_r - m)_o and h_r = W_o' psi_o^-1 u_r, f_r = C h_r and FF_t the sum of f_r f_r',

            sum_o e_r^2 / psi + f_r' f_r = u_r' psi_o^-1 u_r - h_r' f_r
            sum a_r f_r' = psi^-1 (sum u_r f_r' - W_t FF_t)
            sum a_rt^2 = psi_t^-2 (sum u_rt^2 - 2 W_t sum u_rt f_r + W_t FF_t W_t')
        """
        b, t, k = at.loading.shape
        index, weight = self.index[rows] - groups.start, self.weight[rows]
        shown, both = self.shown[:, groups], self.both[:, rows]
        n_seen, first, square = self.n_seen, self.first, self.square
        if len(weight) < len(self.weight):
            n_seen, first, square = _moments(both, weight)
        count = np.bincount(index, weight, minlength=shown.shape[1])
        low, high, full = _triangle(k)
        w = np.ascontiguousarray(at.loading.transpose(2, 0, 1))  # (K, B, T): latents first
        scaled = w / at.noise
        precision = (scaled[low] * w[high]).reshape(len(low) * b, t) @ shown
        precision = precision.reshape(len(low), b * len(count))[full]  # (K, K, B G)
        precision += np.eye(k)[:, :, None]
        c, log_det = inverse(precision[None].astype(np.float32 if rough else np.float64))
        c = c[0].astype(np.float64).reshape(k, k, b, len(count))
        h = np.concatenate([scaled, -scaled * at.mean], 2).reshape(k * b, 2 * t) @ both
        h = h.reshape(k, b, len(index))
        f = np.einsum("klbr,lbr->kbr", c if len(count) == len(index) else c[..., index], h)
        weighted = f * weight
        sides = (weighted.reshape(k * b, len(index)) @ both.T).reshape(k, b, 2 * t)
        of_f = sides[..., t:]
        of_u = sides[..., :t] - at.mean * of_f
        products = (weighted[low] * f[high]).reshape(len(low) * b, len(index))
        ff = (products @ both[t:].T).reshape(len(low), b, t)[full]  # (K, K, B, T)
        z = (c[low, high] * count).reshape(len(low) * b, len(count)) @ shown.T
        z = z.reshape(len(low), b, t)[full]
        known = np.einsum("klbt,lbt->kbt", ff, w)
        u2 = square + at.mean * (n_seen * at.mean - 2 * first)
        total = n_seen.sum() * LOG_2PI + np.log(at.noise) @ n_seen + log_det.reshape(b, len(count)) @ count
        total = total + (u2 / at.noise).sum(1) - np.einsum("kbr,kbr->b", weighted, h)
        return _Sums(
            -0.5 * total,
            (first - n_seen * at.mean - (w * of_f).sum(0)) / at.noise,
            (u2 - (w * (2 * of_u - known)).sum(0)) / at.noise**2,
            ((of_u - known) / at.noise).transpose(1, 2, 0),
            z.transpose(2, 3, 0, 1),
            *(None,) * 4,
        )

    def _by_residuals(self, at: Maps, groups: slice, rows: slice, *, step: bool) -> _Sums:
        """By what is left of each row and token, in which nothing cancels where a noise is all but zero."""
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
    log_det = np.zeros((len(matrix), matrix.shape[-1]), dtype=matrix.dtype)
    matrix = matrix.copy()
    for i in range(k):
        pivot = matrix[:, i, i].copy()
        log_det += np.log(pivot)
        row, column = matrix[:, i] / pivot[:, None], matrix[:, :, i].copy()
        matrix -= column[:, :, None] * row[:, None]
        matrix[:, i], matrix[:, :, i] = row, -column / pivot[:, None]
        matrix[:, i, i] = 1 / pivot
    return matrix, log_det


def _triangle(k: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the upper triangle of a symmetric matrix (K, K), and where in it each entry stands (K, K)."""
    low, high = np.triu_indices(k)
    full = np.zeros((k, k), dtype=np.intp)
    full[low, high] = full[high, low] = np.arange(len(low))
    return low, high, full


def _moments(both: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Of rows and what they show (2 T, R): cells (T,), their sums, sums of squares."""
    t = len(both) // 2
    return both[t:] @ weight, both[:t] @ weight, both[:t] ** 2 @ weight


def _slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]
