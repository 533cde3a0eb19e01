"""The joint density of sites that are coupled in pairs: its normaliser, conditionals and samples.

log p(x) = sum_i h_i(x_i) + sum_{i<j} W_ij(x_i, x_j) - log Z,      L sites, C levels
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.nn.functional import embedding_bag, one_hot

__all__ = ["Couplings", "LogPartition", "Samples"]

MAX_STATES = 2**24  # of the sites that are summed over together


class Samples(NamedTuple):
    """Draws of Gibbs chains."""

    x: NDArray[np.int64]
    """(chains, draws, L) levels."""
    r_hat: float
    """The worst split R-hat of the log-weight and of the indicators of all levels; NaN for fewer than four draws."""
    ess: float
    """The least effective sample size of these."""


class LogPartition(NamedTuple):
    """log Z with its error."""

    value: float
    se: float


class Couplings(NamedTuple):
    """A pairwise density of L sites with C levels each."""

    field: Tensor
    """(L, C)"""
    coupling: Tensor
    """(L, C, L, C), symmetric: W[i, a, j, b] = W[j, b, i, a]; zero for i = j."""

    def log_weight(self, x: ArrayLike | Tensor) -> Tensor:
        """log p(x) + log Z of levels x (N, L): (N,)."""
        codes = torch.as_tensor(x).long()
        own = self.field[torch.arange(codes.shape[1]), codes].sum(1)
        # each pair twice
        return own + 0.5 * self._local(codes).gather(2, codes[..., None])[..., 0].sum(1)

    def log_prob(self, x: ArrayLike | Tensor, log_z: float | None = None) -> Tensor:
        """log p(x) of levels x (N, L): (N,), with an exact log Z unless one is given."""
        return self.log_weight(x) - (self.log_partition() if log_z is None else log_z)

    def conditionals(self, x: ArrayLike | Tensor) -> Tensor:
        """log p(x_i = a | all other sites): (N, L) -> (N, L, C)."""
        return (self.field + self._local(torch.as_tensor(x).long())).log_softmax(-1)

    def _local(self, codes: Tensor) -> Tensor:
        """sum_j W_ij(a, x_j): (N, L) -> (N, L, C)."""
        n_sites, n_levels = self.field.shape
        table = self.coupling.reshape(n_sites * n_levels, -1)
        at = codes + n_levels * torch.arange(n_sites)
        return embedding_bag(at, table, mode="sum").reshape(len(codes), n_sites, n_levels)

    def log_partition(self, max_states: int = MAX_STATES) -> Tensor:
        """log Z, exactly: sites are summed out one by one from the left.

        A site can go once no later one is coupled with it; the table then runs over the sites between, C^b of them
        for couplings of range b, all C^(L - 1) where each site is coupled with each.

        Raises
        ------
        ValueError
            If the table would have more than ``max_states`` cells; see `annealed_log_partition`.
        """
        n_sites, n_levels = self.field.shape
        pairs = self.coupling.abs().amax((1, 3)).nonzero()
        reach = int((pairs[:, 0] - pairs[:, 1]).abs().max()) if len(pairs) else 0
        if n_levels**reach > max_states:
            raise ValueError(
                f"log Z needs a table of {n_levels}^{reach} cells, more than {max_states}: couplings reach over "
                f"{reach} sites. Use annealed_log_partition()"
            )
        table = self.field.new_zeros(())  # over the levels of sites first, ..., i - 1
        first = 0
        for i in range(n_sites):
            before = list(range(first, i))
            leaves = len(before) > 0 and len(before) == reach  # the first of them
            new = []
            for level in range(n_levels):  # one at a time: no table of all
                term = table + self.field[i, level]
                for k, j in enumerate(before):
                    term = term + self.coupling[j, :, i, level].reshape(-1, *[1] * (len(before) - 1 - k))
                new.append(term.logsumexp(0) if leaves else term)
            table = torch.stack(new, -1)
            if reach == 0:
                table = table.logsumexp(-1)
                first = i + 1
            elif leaves:
                first += 1
        return table.flatten().logsumexp(0)

    def annealed_log_partition(
        self, n_chains: int = 256, n_steps: int = 500, random_state: int = 0
    ) -> LogPartition:
        """log Z by annealed importance sampling from independent sites: couplings grow from 0 to 1 in ``n_steps``.

        The weights' mean is unbiased for Z; the standard error of its logarithm is sd(w) / (mean(w) sqrt(chains)),
        reliable while it is well below 1.
        """
        generator = torch.Generator().manual_seed(random_state)
        free = Couplings(self.field, torch.zeros_like(self.coupling))
        x = _draw(self.field.expand(n_chains, -1, -1), generator)
        log_w = self.field.new_zeros(n_chains)
        share = torch.linspace(0, 1, n_steps + 1, dtype=torch.float64)
        tables = self._site_tables()
        for now, after in pairwise(share):
            # w *= f_after(x) / f_now(x), then a sweep that leaves f_after as it is
            log_w = log_w + (after - now) * (self.log_weight(x) - free.log_weight(x))
            _sweep(x, self.field, tables, float(after), generator)
        start = self.field.logsumexp(1).sum()
        w = (log_w - log_w.max()).exp()
        se = float(w.std() / w.mean() / math.sqrt(n_chains))
        return LogPartition(float(start + log_w.logsumexp(0) - math.log(n_chains)), se)

    def sample(
        self,
        n_chains: int = 4,
        n_draws: int = 1000,
        *,
        n_warmup: int = 200,
        thin: int = 1,
        random_state: int = 0,
    ) -> Samples:
        """Gibbs chains side by side, started from independent sites; ``thin`` sweeps between draws."""
        generator = torch.Generator().manual_seed(random_state)
        x = _draw(self.field.expand(n_chains, -1, -1), generator)
        tables = self._site_tables()
        draws = []
        for sweep in range(n_warmup + n_draws * thin):
            _sweep(x, self.field, tables, 1.0, generator)
            if sweep >= n_warmup and (sweep - n_warmup + 1) % thin == 0:
                draws.append(x.clone())
        kept = torch.stack(draws, 1)  # (chains, draws, L)
        r_hat = ess = math.nan
        if n_draws >= 4 and n_chains > 1:
            n_levels = self.field.shape[1]
            weight = self.log_weight(kept.flatten(0, 1)).reshape(n_chains, n_draws, 1)
            traced = torch.cat([weight, one_hot(kept, n_levels).flatten(2).to(weight)], 2)
            traced = traced[..., traced.flatten(0, 1).std(0) > 0]  # a level that never occurs says nothing
            r_hat = float(split_gelman_rubin(traced, 0, 1).nan_to_num(torch.inf).max())
            ess = float(effective_sample_size(traced, 0, 1).nan_to_num(0.0).min())
        return Samples(kept.numpy(), r_hat, ess)

    def _site_tables(self) -> Tensor:
        """(L, L C, C): for each site, what every level of every other adds to its logits."""
        n_sites, n_levels = self.field.shape
        return self.coupling.permute(2, 0, 1, 3).reshape(n_sites, n_sites * n_levels, n_levels).contiguous()

    def zero_sum(self) -> Couplings:
        """The same density with couplings and fields that sum to zero over the levels of each site."""
        w = self.coupling
        by_a, by_both = w.mean(3, keepdim=True), w.mean((1, 3), keepdim=True)
        gauged = w - by_a - w.mean(1, keepdim=True) + by_both
        field = self.field + (by_a - by_both).sum(2)[..., 0]
        return Couplings(field - field.mean(1, keepdim=True), gauged)

    def contact_map(self, corrected: bool = True) -> Tensor:
        """Strength of the couplings between sites (L, L): Frobenius norm in the zero-sum gauge.

        ``corrected`` by the average product, F_ij - F_i F_j / F with means over partners (APC), which takes away what a
        site has with all others.
        """
        norm = self.zero_sum().coupling.square().sum((1, 3)).sqrt()
        if not corrected:
            return norm
        n = len(norm)
        by_site = norm.sum(1) / (n - 1)
        out = norm - by_site[:, None] * by_site / by_site.mean()
        return out.fill_diagonal_(0.0)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Levels with these logits (..., C): the largest after Gumbel noise."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    return (logits - (-uniform.log()).log()).argmax(-1)


def _sweep(x: Tensor, field: Tensor, tables: Tensor, share: float, generator: torch.Generator) -> None:
    """Draw each site in turn given all others, in place: chains x (B, L), couplings times ``share``."""
    n_sites, n_levels = field.shape
    at = x + n_levels * torch.arange(n_sites)
    for i in range(n_sites):
        logits = field[i] + share * embedding_bag(at, tables[i], mode="sum")
        x[:, i] = _draw(logits, generator)
        at[:, i] = x[:, i] + n_levels * i


# ---------------------------------------------------------------------------------------------------------- helpers
