"""Exact conditionals of linear-Gaussian programs that are a Markov chain of blocks, in a time linear in the length.

    z_b = start + step z_(b-1) + root u_b,    x_b = loc + before z_(b-1) + own u_b + e_b,    u_b ~ N(0, I)

A stretch of the chain, from the end of block i to the end of block j, is for the rest of the program two things, given
its visible tokens: p(z_j | z_i, x) = N(A z_i + b, C), and p(x | z_i), proportional to exp(eta' z_i - z_i' J z_i / 2).
Two stretches make a longer one, so that a binary tree of stretches (Sarkka & Garcia-Fernandez 2021) gives all that is
asked, up the tree for the density, down again for the posterior, a level at a time. No covariance is inverted: small
noises of latents and of tokens do no harm.

A chain of conditionals needs the tree at T moments. Between two of them one token is revealed, and only the stretches
around it change: a stretch of m tokens has m + 1 versions, and the tree of all versions has T of them at each level.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.base import Bound, Conditionals, Posterior
from bayes_mpt.predictors.gaussian.chain_tree import (
    ChainRows,
    Found,
    down,
    every_block,
    every_moment,
    finish,
    leaves_of,
    refuse_lost_digits,
    up,
)
from bayes_mpt.predictors.gaussian.linear import CHUNK, LOG_2PI, LinearGaussian
from bayes_mpt.program.affine import (
    DenseMap,
    affine_form,
    latent_values,
    read,
)
from bayes_mpt.program.affine.sparse import Sparse
from bayes_mpt.program.affine.sparse_map import NotSparse, SparseMap
from bayes_mpt.program.analysis import Analysis
from bayes_mpt.program.program import Model, Program

__all__ = ["MarkovGaussian", "MarkovRows", "closed_form"]


def closed_form(model: Model, args: tuple[Any, ...], analysis: Analysis) -> Bound:
    """A linear-Gaussian program scored in closed form, along a chain or dense: whichever needs less work.

    Raises
    ------
    bayes_mpt.program.affine.NotAffine
        If the program is something else; the message names the site.
    """
    try:
        return MarkovGaussian(model, args, analysis=analysis)
    except NotSparse:
        return LinearGaussian(model, args, analysis=analysis)


class MarkovGaussian(Bound):
    """A linear-Gaussian program whose latents form a chain, found by evaluation, scored in closed form.

    Parameters
    ----------
    model : callable
        A Pyro program with Normal tokens and latents, the mean of each affine in a few latents.
    args : tuple
        What it is called with; N rows of T tokens.
    analysis : bayes_mpt.program.analysis.Analysis, optional
        Of the program on these rows, where it has been made already.

    Raises
    ------
    bayes_mpt.program.affine.sparse.NotSparse
        If `LinearGaussian` needs less work.
    bayes_mpt.program.affine.NotAffine
        If the program is not linear-Gaussian; the message names the site.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def walk(x):
    ...     z = x.new_zeros(())
    ...     for t in pyro.markov(range(len(x))):
    ...         z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
    ...         pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])
    >>> x = torch.zeros(100, dtype=torch.float64)
    >>> MarkovGaussian(walk, (x,)).read((x,)).score()  # N(0; 0, min(s, t) + [s = t])
    tensor([-139.8533], dtype=torch.float64)
    """

    name = "Exact"
    model: Model

    def __init__(self, model: Model, args: tuple[Any, ...], *, analysis: Analysis | None = None):
        self.model = model
        self._way = Sparse()
        self.form = affine_form(model, args, self._way, analysis=analysis)
        self.structure = self.form.program
        assert self._way.layout is not None
        layout = self._way.layout
        self.why = (
            "every mean is affine in a few latents and every scale is free of them, checked by evaluation; the latents "
            f"form a chain of {layout.n_blocks} blocks of {layout.width}, each of which depends on the one before, so "
            "the time is linear in the length"
        )

    def read(self, args: tuple[Any, ...]) -> MarkovRows:
        return MarkovRows(self.structure, read(self.model, args, self.form, self._way))


class MarkovRows(Conditionals):
    """Rows under linear-Gaussian maps along a chain of latents: one for all, or one for each."""

    def __init__(self, structure: Program, reading: SparseMap):
        self.structure, self.reading = structure, reading
        self.value, self.scale = reading.value, reading.scale

    def at(self, tokens: Tensor) -> MarkovRows:
        return MarkovRows(self.structure, self.reading._replace(value=tokens))

    def detached(self) -> MarkovRows:
        loc, latent_loc, slope, root, noise = (t.detach().clone() for t in self.reading[:5])
        layout = self.reading.layout
        return MarkovRows(
            self.structure, SparseMap(loc, latent_loc, slope, root, noise, self.scale, loc[:0], layout)
        )

    def linear_map(self) -> DenseMap:
        return self.reading.dense()

    def conditionals(self, visible: Tensor) -> Tensor:
        x = self.value
        rows = ChainRows(x, self.reading)
        step = max(1, CHUNK // max(1, x.numel() * self.reading.layout.width**2))
        out = []
        for start in range(0, len(visible), step):
            shown = visible[start : start + step, None]  # (S, 1, T)
            _, found = self._smooth(rows, shown & rows.seen)
            mean, var = rows.by_token(found.tokens), rows.of_token(found.variance)
            hidden = ~shown & ~x.isnan()
            value = torch.where(hidden, x, mean)
            log_prob = -0.5 * ((value - mean).square() / var + var.log() + LOG_2PI)
            out.append(torch.where(hidden, log_prob, 0.0))
        return torch.cat(out)

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        rows = ChainRows(self.value, self.reading)
        with torch.no_grad():
            self._smooth(rows, rows.seen[None])  # refuses where digits are lost
        return torch.stack([self._chain(rows, tokens) for tokens in order])

    def _joint(self) -> Tensor:
        x = self.value
        step = max(1, CHUNK // max(1, x.shape[1] * self.reading.layout.width**2))
        if len(x) <= step or len(self.reading.loc) > 1:
            return self._log_density(x)
        return torch.cat([self._log_density(x[i : i + step]) for i in range(0, len(x), step)])

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        rows = ChainRows(self.value, self.reading)
        shown = rows.seen if visible is None else rows.seen & visible
        _, found = self._smooth(rows, shown[None])
        mean = rows.by_latent(found.z)[0]
        # the mean of the tokens is affine in the latents, so that their means are enough
        shared = None if self.structure.by_row else lambda: [(1.0, latent_values(self.structure, mean))]
        return Posterior(mean, rows.by_token(found.tokens)[0], of_shared=shared)

    # ------------------------------------------------------------------------------------------------ the algebra

    def _log_density(self, x: Tensor) -> Tensor:
        rows = ChainRows(x, self.reading)
        logdet, found = self._smooth(rows, rows.seen[None])
        # r' S^-1 r = |r - W u|^2 / noise + |u|^2 at the posterior mean u: sums of squares, nothing cancels
        rest = torch.where(x.isnan(), 0.0, x - rows.by_token(found.tokens)[0])
        quadratic = (rest.square() / self.reading.noise).sum(-1) + rows.squares(found.u)
        logdet = logdet + torch.where(rows.seen, self.reading.noise.log(), 0.0).sum(-1)
        return -0.5 * (quadratic + (logdet + rows.seen.sum(-1).to(x) * LOG_2PI)[rows.index])

    def _smooth(self, rows: ChainRows, shown: Tensor) -> tuple[Tensor, Found]:
        """Log det of the covariance over that of the noises, of mask 0; and all blocks given the shown (S, G, T)."""
        plan = every_block(self.reading.layout.n_blocks, rows.index.device)
        leaves = leaves_of(rows.blocks, rows.in_slots(shown), rows.residual, rows)
        tree = up(leaves.stretch, plan, rows)
        outside = down(tree, plan, rows)
        found = finish(leaves, outside, rows)
        refuse_lost_digits(found, outside, rows)
        return tree[-1].logdet[0, :, 0], found

    def _chain(self, rows: ChainRows, order: Tensor) -> Tensor:
        """(N, T), by token."""
        layout = self.reading.layout
        plan = every_moment(layout.slot // layout.n_slots, order, layout.n_blocks)
        shown = plan.shown(
            layout.slot % layout.n_slots, layout.n_slots
        )  # (m, t) of the versions of the blocks
        shown = shown & rows.in_slots(rows.seen[None])[:, :, plan.block]
        leaves = leaves_of(rows.blocks.take(plan.block), shown, rows.residual[:, :, plan.block], rows)
        outside = down(up(leaves.stretch, plan.plan, rows), plan.plan, rows)
        found = finish(leaves.take(plan.version), outside, rows)
        # of the slots of the block, that of the token
        slot = (layout.slot % layout.n_slots)[:, None]
        here = torch.arange(layout.n_slots, device=slot.device) == slot  # (T, t)
        mean = rows.rows_first((found.tokens * here[..., None]).sum(-2))[0]
        var = rows.of_rows((found.variance * here).sum(-1))[0]
        seen = ~rows.x.isnan()
        value = torch.where(seen, rows.x, mean)
        log_prob = -0.5 * ((value - mean).square() / var + var.log() + LOG_2PI)
        return torch.where(seen, log_prob, 0.0)
