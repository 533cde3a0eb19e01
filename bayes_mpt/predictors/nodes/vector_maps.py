"""One vector of observations, linear-Gaussian given discrete latents of the data set: a map for each of their values.

    p(x) = sum_s p(d_s) N(x; m_s, C_s),    d_s all S combinations of the values of the discrete latents

Which weights of a regression are not zero (spike and slab) is such a latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.nodes.given import AffineBatch
from bayes_mpt.predictors.nodes.weighted import FixedSites, NodeSource, Read
from bayes_mpt.program.affine import NotAffine
from bayes_mpt.program.arguments import Args, fill_all
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.program import Latent, Model, ModelError, Program, list_names, split_events
from bayes_mpt.program.run import run
from bayes_mpt.program.sites import node_of
from bayes_mpt.program.store import own_random_state

__all__ = ["MAX_VECTOR_MAPS", "vector_of_maps"]

MAX_VECTOR_MAPS = 1024  # combinations of values, each of which the program is run at


def vector_of_maps(model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
    """Programs of one vector that are linear-Gaussian given the discrete latents.

    Raises
    ------
    ModelError
        If there are too many combinations of their values, or the rest is not linear-Gaussian at one of them.
    """
    return _VectorMaps(model, args, split_events(program))


class _VectorMaps(NodeSource):
    """One node for each combination of the values of the discrete latents, with a linear-Gaussian map of its own."""

    name = "Exact"

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        self.model, self.structure = model, program
        self.sites = [site for site in program.latents if site.discrete]
        self.values, self.combinations = _combinations(model, args, self.sites)
        self.n_nodes = len(self.combinations)
        self.why = (
            f"the values of {list_names(program.discrete)} are summed out, and given them every mean is affine in the "
            "other latents"
        )
        try:
            self.maps = LinearGaussian(self._fixed(0), args)
            for s in (self.n_nodes // 2, self.n_nodes - 1):
                LinearGaussian(self._fixed(s), args)
        except NotAffine as error:
            raise ModelError(str(error)) from error
        filled = fill_all(args)
        first, second = (self._log_prior(filled, seed) for seed in range(2))
        if not torch.allclose(first, second, rtol=1e-9, atol=1e-12):
            raise ModelError(
                f"the distribution of {list(program.discrete)} depends on {list(program.continuous)}: given the "
                "discrete values the others are not Gaussian. Use Importance() with a guide"
            )

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        maps = [self.maps.with_model(self._fixed(s)).read(args.given) for s in range(self.n_nodes)]
        log_weight = self._log_prior(args.filled)[:, None]  # (S, 1)
        columns = [self.values[self._site_of[i]][column] for i, column in enumerate(self.combinations.T)]
        latents = torch.stack(columns, -1).to(log_weight)[:, None]  # (S, 1, entries)
        names = tuple(site.name for site in self.sites)
        return Read(AffineBatch(maps), log_weight, maps[0].value, maps[0].scale, latents, names)

    @property
    def _site_of(self) -> list[int]:
        """The site of each column of the combinations."""
        return [i for i, site in enumerate(self.sites) for _ in range(site.width)]

    def _fixed(self, s: int, hide: bool = True) -> FixedSites:
        """The program at one combination."""
        starts, values = 0, {}
        for site, support in zip(self.sites, self.values, strict=True):
            index = self.combinations[s, starts : starts + site.width]
            values[site.name] = support[index].reshape(site.shape)
            starts += site.width
        return FixedSites(self.model, values, hide)

    def _log_prior(self, filled: tuple[Any, ...], seed: int = 0) -> Tensor:
        """log p(d_s), (S,); the other latents are drawn, and must not matter."""
        out = []
        for s in range(self.n_nodes):
            with own_random_state(seed):
                trace = run(self._fixed(s, hide=False), filled)
            nodes = [node_of(trace, site.name) for site in self.sites]
            parts = [log_density(node["fn"], node["value"]).sum() for node in nodes]
            out.append(torch.stack(parts).sum())
        return torch.stack(out)


def _combinations(model: Model, args: tuple[Any, ...], sites: list[Latent]) -> tuple[list[Tensor], Tensor]:
    """The values (L,) of each site, and the numbers (S, entries) of all combinations of them."""
    trace = run(model, fill_all(args))
    supports = []
    for site in sites:
        fn = trace.nodes[site.name]["fn"]
        if fn.event_dim:
            raise ModelError(
                f"discrete latent {site.name!r} has vectors as values, which are not summed out here"
            )
        supports.append(fn.enumerate_support(expand=False).reshape(-1))
    sizes = [len(support) for site, support in zip(sites, supports, strict=True) for _ in range(site.width)]
    n_combinations = 1
    for size in sizes:
        n_combinations *= size
    if n_combinations > MAX_VECTOR_MAPS:
        raise ModelError(
            f"discrete latents {[site.name for site in sites]} have {n_combinations} combinations of values, more than "
            f"{MAX_VECTOR_MAPS} linear-Gaussian maps: use fewer"
        )
    ranges = [torch.arange(size, device=supports[0].device) for size in sizes]
    return supports, torch.cartesian_prod(*ranges).reshape(-1, len(sizes))
