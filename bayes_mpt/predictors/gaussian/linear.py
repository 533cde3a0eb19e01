"""Exact conditionals of linear-Gaussian programs.

    x = loc + loading u + e,    u ~ N(0, I_K),    e ~ N(0, diag(noise))

All of it is K x K algebra on the posterior of u: by normal equations, or by QR of their square root where a noise is so
small that squaring would cost digits. Rows with missing cells share their factorisations by pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Bound, Conditionals, Posterior
from bayes_mpt.predictors.objective import Batch, Objective, Outputs
from bayes_mpt.program.affine import (
    Dense,
    DenseMap,
    first_reading,
    latent_values,
    read,
    read_stated,
    stated_form,
)
from bayes_mpt.program.affine.first import FirstReading
from bayes_mpt.program.analysis import Analysis
from bayes_mpt.program.arguments import N_TRIAL_ROWS
from bayes_mpt.program.devices import at_once
from bayes_mpt.program.program import Model, ModelError, NotPositiveDefinite, Program

__all__ = ["Groups", "LinearGaussian", "LinearRows", "cholesky", "dimensionless", "group_rows"]

LOG_2PI = math.log(2 * math.pi)
SMALL_NOISE = 1e-5  # of the token's variance; below it the normal equations lose more than 1e-9
CHUNK = 2**24  # numbers in one temporary
CACHED_CHUNK = 2**17  # numbers in one temporary that stays in the cache
MAX_DENSE = 32  # tokens up to which a dense factor is cheaper than the algebra of the latents
MAX_WHITENED = 64  # tokens up to which one product of all rows costs less than ten passes over them


class LinearGaussian(Bound):
    """A linear-Gaussian program, found to be one by evaluation, scored in closed form.

    Parameters
    ----------
    model : callable
        A Pyro program with Normal tokens whose means are affine in Normal latents.
    args : tuple
        What it is called with; N rows of T tokens.
    n_trial : int, default=8
        Rows on which what one run can show is checked.
    analysis : bayes_mpt.program.analysis.Analysis, optional
        Of the program on these rows, where it has been made already.

    Raises
    ------
    bayes_mpt.program.affine.NotAffine
        If the program is something else; the message names the site.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("rows", len(x)):
    ...         z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    ...         pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)
    >>> x = torch.zeros(4, 2, dtype=torch.float64)
    >>> LinearGaussian(model, (x,)).read((x,)).score()[0]  # N(0; 0, [[2, 1], [1, 2]])
    tensor(-2.3872, dtype=torch.float64)
    """

    name = "Exact"
    why = "every mean is affine in the latents and every scale is free of them, checked by evaluation"
    model: Model

    def __init__(
        self,
        model: Model,
        args: tuple[Any, ...],
        n_trial: int = N_TRIAL_ROWS,
        *,
        analysis: Analysis | None = None,
    ):
        self.model = model
        self.form, reading = first_reading(model, args, n_trial=n_trial, analysis=analysis)
        self.structure = self.form.program._replace(dense=True)
        self._first = None if self.structure.per_row else FirstReading(reading)

    @classmethod
    def stated(cls, model: Model, args: tuple[Any, ...]) -> LinearGaussian | None:
        """A program that states its map (`bayes_mpt.program.affine.stated_form`); None of one that does not."""
        found = stated_form(model, args)
        if found is None:
            return None
        new = object.__new__(cls)
        new.model, new.form, new.structure, new._first = model, found, found.program, None
        new.why = "the model states its linear-Gaussian map, with which its first run agrees"
        return new

    def read(self, args: tuple[Any, ...]) -> LinearRows:
        if self.structure.parts is not None:
            return LinearRows(self.structure, read_stated(self.structure.parts, self.model, args))
        known = None if self._first is None else self._first.take()
        return LinearRows(self.structure, read(self.model, args, self.form, Dense(), known))

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        return [Objective(self, whole, masks, outputs=_outputs)]

    def with_model(self, model: Model) -> LinearGaussian:
        """The same way of reading for another program of the same structure."""
        new = object.__new__(LinearGaussian)
        new.model, new.form, new._first = model, self.form, None
        new.structure = self.structure._replace(parts=None)  # which were stated of the other
        return new


def _outputs(objective: Objective, read: Conditionals | None) -> Outputs:
    """The numbers of the maps, which tell the units."""
    found = (objective.read() if read is None else read).linear_map()
    assert found is not None  # `LinearRows`
    return Outputs(torch.cat([part.flatten() for part in dimensionless(found)]), whole=True)


class LinearRows(Conditionals):
    """Rows under linear-Gaussian maps: one for all, or one for each."""

    def __init__(self, structure: Program, reading: DenseMap):
        self.structure, self.reading = structure, reading
        self.value, self.scale = reading.value, reading.scale

    def at(self, tokens: Tensor) -> LinearRows:
        return LinearRows(self.structure, self.reading._replace(value=tokens))

    def detached(self) -> LinearRows:
        loc, loading, noise, latent_loc, root = (t.detach().clone() for t in self.reading[:5])
        return LinearRows(
            self.structure, DenseMap(loc, loading, noise, latent_loc, root, self.scale, value=loc[:0])
        )

    def linear_map(self) -> DenseMap:
        return self.reading

    def conditionals(self, visible: Tensor) -> Tensor:
        x = self.value
        groups = group_rows(x, self.reading.loc)
        n_masks = len(visible)
        step = max(1, CHUNK // max(1, x.numel() * max(1, self.reading.loading.shape[-1])))
        out = x.new_zeros(n_masks, *x.shape)
        for start in range(0, n_masks, step):
            shown = visible[start : start + step, None] & groups.seen  # (S, G, T)
            mean, var = self._predict(x, shown, groups)
            hidden = ~visible[start : start + step, None] & groups.seen[0, groups.index]
            value = torch.where(hidden, x, mean)
            log_prob = -0.5 * ((value - mean).square() / var + var.log() + LOG_2PI)
            out[start : start + step] = torch.where(hidden, log_prob, 0.0)
        return out

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        x = self.value
        loc, loading, noise = self.reading[:3]
        groups = group_rows(x, loc)
        residual = torch.where(x.isnan(), 0.0, x - loc)
        seen = groups.seen[0]  # (G, T)
        out = []
        for tokens in order:
            # Missing tokens are decoupled (a unit variance of their own), which leaves the others' chain alone.
            shown = seen[:, tokens]
            # L L' = S[order, order]:  log p(x_t | x_<t) = -(L^-1 r)_t^2 / 2 - log L_tt - log(2 pi) / 2
            factor = self._covariance_factor(
                torch.where(shown[..., None], loading[:, tokens], 0.0),
                torch.where(shown, noise[:, tokens], 1.0),
            )  # (G, T, T)
            white = _solve_rows(factor, residual[:, tokens], groups)  # (N, T)
            log_diagonal = factor.diagonal(dim1=-2, dim2=-1).abs().log()[groups.index]
            log_prob = torch.where(shown[groups.index], -0.5 * (white.square() + LOG_2PI) - log_diagonal, 0.0)
            out.append(torch.empty_like(log_prob).index_copy(1, tokens, log_prob))
        return torch.stack(out)

    def _joint(self) -> Tensor:
        x = self.value
        step = max(1, CHUNK // max(1, x.shape[1] * max(1, self.reading.loading.shape[-1])))
        if len(x) <= step or len(self.reading.loc) > 1:
            return self._log_density(x)
        return torch.cat([self._log_density(x[i : i + step]) for i in range(0, len(x), step)])

    @property
    def dense(self) -> bool:
        """Whether the tokens' own covariance is as cheap as that of the latents."""
        n_tokens, n_latents = self.reading.loading.shape[-2:]
        return n_tokens <= max(n_latents, MAX_DENSE)

    def score_under_each(self) -> Tensor:
        """Log-densities (B, N) of complete rows under each of the B maps, or the one of all, not each under its own."""
        x = self.value
        loc, loading, noise = self.reading[:3]
        # L L' = S:  log p(x) = -|L^-1 (x - loc)|^2 / 2 - log det L - T log(2 pi) / 2
        factor = self._covariance_factor(loading, noise)  # (B, T, T)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        root = torch.linalg.solve_triangular(factor, eye, upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        constant = -log_det[:, None] - 0.5 * x.shape[1] * LOG_2PI  # (B, 1)
        # differences to loc as a number; its gradient takes the short way, through a shift that is zero
        centre = loc.detach()
        shift = (root @ (loc - centre)[..., None]).mT  # (B, 1, T)
        out = []
        step = max(1, len(x))
        if step * loc.numel() > CACHED_CHUNK:
            step = max(1, at_once(CACHED_CHUNK, x.device) // loc.numel())
        for i in range(0, len(x), step):
            white = (x[i : i + step] - centre[:, None]) @ root.mT  # (B, n, T)
            white = white - shift if loc.requires_grad else white
            out.append(constant - 0.5 * white.square().sum(-1))
        return torch.cat(out, 1)

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x = self.value
        loc, loading = self.reading[:2]
        groups = group_rows(x, loc)
        shown = groups.seen if visible is None else groups.seen & visible
        u = self._latents(x, shown, groups)[0][0]  # (N, K)
        n_latents = self.structure.n_latents  # further columns are correlated noise
        mean = self.reading.latent_loc + (self.reading.latent_root @ u[:, :n_latents, None])[..., 0]
        # the mean of the tokens is affine in the latents, so that their means are enough
        shared = None if self.structure.by_row else lambda: [(1.0, latent_values(self.structure, mean))]
        return Posterior(mean, loc + _times_rows(loading, u), of_shared=shared)

    # ------------------------------------------------------------------------------------------------ the algebra

    @property
    def _small_noise(self) -> bool:
        """Whether squaring (normal equations, covariances) would lose digits."""
        with torch.no_grad():
            noise = self.reading.noise
            if not bool((noise > 0).all()):
                raise NotPositiveDefinite(
                    f"a noise variance of observed site {self.structure.observed!r} is {float(noise.min())}: every "
                    "token needs noise"
                )
            return bool((noise <= SMALL_NOISE * (self.reading.loading.square().sum(-1) + noise)).any())

    def _log_density(self, x: Tensor) -> Tensor:
        loc, loading, noise = self.reading[:3]
        few = x.shape[1] <= MAX_WHITENED and len(x) > x.shape[1] and len(loc) == 1
        if few and not torch.is_grad_enabled() and x.dtype == torch.float64 and not bool(x.isnan().any()):
            return self.at(x).score_under_each()[0]
        groups = group_rows(x, loc)
        seen = groups.seen[0]  # (G, T)
        residual = _residual(x, loc, seen)
        u, factor = (t[0] for t in self._latents(x, groups.seen, groups))
        # r' S^-1 r = |r - W u|^2 / noise + |u|^2 at the posterior mean u: sums of squares, nothing cancels
        rest = residual - _times_rows(loading, u)
        if not _complete(seen):
            rest = torch.where(seen[groups.index], rest, 0.0)
        quadratic = (rest.square() / noise).sum(-1) + u.square().sum(-1)
        # log det S = log det noise + log det C^-1
        logdet = torch.where(seen, noise.log(), 0.0).sum(-1)
        logdet = logdet + 2 * factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        count = seen.sum(-1).to(x)
        return -0.5 * (quadratic + (logdet + count * LOG_2PI)[groups.index])

    def _latents(self, x: Tensor, shown: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Posterior means of u (S, N, K) and a lower factor of their precision C^-1 (S, G, K, K), given the shown."""
        loc, loading, noise = self.reading[:3]
        residual = _residual(x, loc, groups.seen[0])  # (N, T)
        n_latents = loading.shape[-1]
        eye = torch.eye(n_latents, dtype=x.dtype, device=x.device)
        if not self._small_noise:
            # C^-1 = I + W_R' D_R^-1 W_R,  u = C W_R' D_R^-1 r_R
            scaled = loading / noise[..., None]  # (B, T, K)
            weight = shown.to(x)
            if len(loading) == 1 and shown.shape[:2] == (1, 1):
                inner = ((weight[0, 0, :, None] * scaled[0]).mT @ loading[0])[None, None]
            elif len(loading) == 1:
                outer = (scaled[0, :, :, None] * loading[0, :, None, :]).flatten(1)
                inner = (weight @ outer).unflatten(-1, (n_latents, n_latents))
            else:
                inner = (weight[..., None] * scaled).mT @ loading
            factor = cholesky(inner + eye)
            return _cholesky_solve_rows(
                factor, self._weighted(residual, shown, scaled, groups), groups
            ), factor
        # [I; D_R^-1/2 W_R] = Q R:  C^-1 = R' R,  u = R^-1 Q_R' D_R^-1/2 r_R
        whiten = torch.where(shown, noise.rsqrt(), 0.0)  # (S, G, T)
        top = eye.expand(*shown.shape[:2], n_latents, n_latents)
        q, r = torch.linalg.qr(torch.cat([top, whiten[..., None] * loading], dim=-2))
        white = (whiten[:, groups.index] * residual)[..., None, :]  # (S, N, 1, T)
        pulled = white @ (q[..., n_latents:, :] if len(q[0]) == 1 else q[:, groups.index, n_latents:])
        r_rows = r if len(r[0]) == 1 else r[:, groups.index]
        return torch.linalg.solve_triangular(r_rows, pulled.mT, upper=True)[..., 0], r.mT

    def _covariance_factor(self, loading: Tensor, noise: Tensor) -> Tensor:
        """Lower factor of W W' + diag(noise): (G, T, K), (G, T) -> (G, T, T)."""
        if not self._small_noise:
            return cholesky(loading @ loading.mT + torch.diag_embed(noise))
        # [W, noise^1/2]' = Q R:  S = R' R, without squaring
        return torch.linalg.qr(torch.cat([loading, torch.diag_embed(noise.sqrt())], -1).mT)[1].mT

    def _weighted(self, residual: Tensor, shown: Tensor, scaled: Tensor, groups: Groups) -> Tensor:
        """Sum over visible t of r_nt scaled_tk: (S, N, K), as S products of matrices where the map is shared."""
        if len(scaled) > 1:
            r = torch.where(shown[:, groups.index], residual, 0.0)
            return torch.einsum("snt,ntk->snk", r, scaled)
        # residual is zero where missing, so what is visible in the mask alone is enough: any group shows it
        visible = shown.any(1)  # (S, T)
        if len(visible) == 1:
            return (residual @ (visible[0, :, None] * scaled[0]))[None]
        return residual @ (visible[..., None] * scaled)

    def _predict(self, x: Tensor, shown: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Means and variances (S, N, T) of all tokens given the shown ones (S, G, T)."""
        loc, loading, noise = self.reading[:3]
        u, factor = self._latents(x, shown, groups)
        mean = loc + _times_rows(loading, u)
        # var_i = noise_i + w_i' C w_i
        root = torch.linalg.solve_triangular(factor, loading.mT, upper=False)  # (S, G, K, T)
        return mean, (noise + root.square().sum(-2))[:, groups.index]


def dimensionless(reading: DenseMap) -> tuple[Tensor, Tensor, Tensor]:
    """loc and loading in units of what the other tokens leave unexplained of each token, and log noise."""
    with torch.no_grad():
        loading, noise = reading.loading, reading.noise[..., None]
        eye = torch.eye(loading.shape[-1], dtype=loading.dtype, device=loading.device)
        # R'R = I + W' psi^-1 W, by QR: where a noise is all but zero its Cholesky factor has no digits left
        stacked = torch.cat([eye.expand(*loading.shape[:-2], -1, -1), loading / noise.sqrt()], -2)
        upper = torch.linalg.qr(stacked, mode="r")[1]
        # diag(S^-1) = 1/psi - diag(psi^-1 W C W' psi^-1)
        root = torch.linalg.solve_triangular(upper.mT, (loading / noise).mT, upper=False)
        unit = (1 / reading.noise - root.square().sum(-2)).rsqrt()
    return reading.loc / unit, reading.loading / unit[..., None], reading.noise.log()


@dataclass(frozen=True)
class Groups:
    """Rows that share a factorisation: one missing pattern, or each row its own where maps differ."""

    seen: Tensor
    """(1, G, T) bool, observed cells."""
    index: Tensor
    """(N,) group of each row."""


def group_rows(x: Tensor, loc: Tensor) -> Groups:
    """Rows (N, T) by their missing cells; each its own group where there are several maps, of means ``loc`` (B, T)."""
    if x.shape[1] != loc.shape[1]:
        raise ModelError(f"rows have {loc.shape[1]} tokens, got x of shape {tuple(x.shape)}")
    if (
        len(loc) == 1 and len(x) and not bool(x.sum().isnan())
    ):  # a sum costs a tenth, and rules missing cells out
        index = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return Groups(torch.ones(1, 1, x.shape[1], dtype=torch.bool, device=x.device), index)
    seen = ~x.isnan()
    if len(loc) > 1:
        if len(x) != len(loc):
            raise ModelError(
                f"each of the {len(loc)} rows that were read has a map of its own, got {len(x)} rows: call read(args) "
                "with the rows to be scored"
            )
        return Groups(seen[None], torch.arange(len(x), device=x.device))
    if bool(seen.all()) and len(x):
        return Groups(seen[None, :1], torch.zeros(len(x), dtype=torch.long, device=x.device))
    patterns, index = torch.unique(seen, dim=0, return_inverse=True)
    return Groups(patterns[None], index)


def _complete(seen: Tensor) -> bool:
    """Whether no row misses a cell, by the patterns (G, T) of rows that share a map."""
    return len(seen) == 1 and bool(seen.all())


def _residual(x: Tensor, loc: Tensor, seen: Tensor) -> Tensor:
    """x - loc (N, T), zero where missing."""
    return x - loc if _complete(seen) else torch.where(x.isnan(), 0.0, x - loc)


def _times_rows(matrix: Tensor, u: Tensor) -> Tensor:
    """M_n u_n: (B, T, K), (..., N, K) -> (..., N, T); one product of matrices where they are shared."""
    return u @ matrix[0].mT if len(matrix) == 1 else (matrix @ u[..., None])[..., 0]


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor (..., D, D), or an error that says what singular noise to look for."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise ModelError(
            "the covariance of the tokens is singular in float64: a noise variance is zero, not finite, or below about "
            "1e-15 of its token's variance. Give every token more noise"
        )
    return factor


def _solve_rows(factor: Tensor, r: Tensor, groups: Groups) -> Tensor:
    """L_g(n)^-1 r_n: factor (G, T, T), r (N, T) -> (N, T)."""
    if len(factor) == 1:
        return torch.linalg.solve_triangular(factor[0], r.mT, upper=False).mT
    return torch.linalg.solve_triangular(factor[groups.index], r[..., None], upper=False)[..., 0]


def _cholesky_solve_rows(factor: Tensor, r: Tensor, groups: Groups) -> Tensor:
    """(L L')_g(n)^-1 r_n: factor (S, G, K, K), r (S, N, K) -> (S, N, K)."""
    if factor.shape[1] == 1:
        return torch.cholesky_solve(r.mT, factor[:, 0]).mT
    return torch.cholesky_solve(r[..., None], factor[:, groups.index])[..., 0]
