"""Exact conditionals: what of the latents can be integrated or summed out without error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bayes_mpt.predictors.base import Bound, Guide, Predictor
from bayes_mpt.predictors.gaussian.linear import LinearGaussian
from bayes_mpt.predictors.gaussian.markov import closed_form
from bayes_mpt.predictors.gaussian.process import JointGaussian, gaussian_program
from bayes_mpt.predictors.nodes.enumeration import enumerated, mixture_of_maps
from bayes_mpt.predictors.nodes.stated_mixture import mixture_as_stated
from bayes_mpt.predictors.nodes.vector_maps import vector_of_maps
from bayes_mpt.program.affine import NotAffine, check_normal
from bayes_mpt.program.analysis import look
from bayes_mpt.program.offers import offered
from bayes_mpt.program.program import Model, ModelError, Program

__all__ = ["Exact", "as_stated", "by_its_map", "summed_out"]


class Exact(Predictor):
    """No error: linear-Gaussian programs in closed form, discrete latents summed out, mixtures of both.

    Linear-Gaussian programs in which every site looks at few latents (a local level, a linear dynamical system, lags)
    take a time linear in their length; others that of dense algebra, cubic in the number of latents.

    Discrete latents are summed by Pyro's own tensor variable elimination, in time linear in the length of a chain
    written with `pyro.markov`. Where tokens are Normal given them, and Normal latents stand beside them, every joint
    value of the discrete latents of a row has a linear-Gaussian map of its own; so has every combination of the values
    of discrete latents of the data set (which weights of a regression are not zero).

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def coins(x):
    ...     with pyro.plate("rows", len(x)):
    ...         fair = pyro.sample("fair", dist.Bernoulli(x.new_tensor(0.5)))
    ...         p = torch.where(fair == 1, 0.5, 0.9)
    ...         pyro.sample("x", dist.Bernoulli(p[..., None].expand(*p.shape, 2)).to_event(1), obs=x)
    >>> x = torch.ones(1, 2, dtype=torch.float64)
    >>> Exact().bind(coins, (x,)).read((x,)).score().exp()  # (0.5^2 + 0.9^2) / 2
    tensor([0.5300], dtype=torch.float64)
    """

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        vector = gaussian_program(model, args)
        if vector is not None:
            return JointGaussian(model, vector)
        stated = as_stated(model, args)
        return by_its_map(model, args, partial(summed_out, model, args)) if stated is None else stated


def as_stated(model: Model, args: tuple[Any, ...]) -> Bound | None:
    """A program by what it says of its own density, with which its first run agrees; None where it says nothing."""
    if offered(model, "linear_map") is not None:
        return LinearGaussian.stated(model, args)
    return None if offered(model, "mixture_map") is None else mixture_as_stated(model, args)


def by_its_map(
    model: Model, args: tuple[Any, ...], otherwise: Callable[[Program, NotAffine], Bound]
) -> Bound:
    """A program by its linear-Gaussian map; one that has none as ``otherwise`` has it, which is told the reason."""
    analysis = look(model, args)
    try:
        check_normal(analysis.first, analysis.program)  # before anything is run again
        return closed_form(model, args, analysis)
    except NotAffine as error:
        reason = error
    return otherwise(analysis.checked(), reason)


def summed_out(model: Model, args: tuple[Any, ...], program: Program, reason: NotAffine) -> Bound:
    """What of a program that is not linear-Gaussian is so given its discrete latents, or has no others."""
    kinds = {site.kind for site in program.sites}
    if program.discrete and kinds <= {"Normal", "MultivariateNormal"}:
        if program.continuous or "MultivariateNormal" in kinds:
            of = mixture_of_maps if program.by_row else vector_of_maps
            return of(model, args, program)
    if program.continuous:
        raise ModelError(
            f"{reason} Latent sites {list(program.continuous)} are neither linear-Gaussian nor discrete, so they "
            "cannot be integrated exactly: use Quadrature() for up to four numbers a row, Importance() with a "
            "guide, or SequentialMonteCarlo() for latents that all rows share"
        )
    return enumerated(model, args, program)
