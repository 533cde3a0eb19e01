"""In which units the parameters move, so that the path is the same whatever the columns' scales."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from bayes_mpt.masks import torch_generator
from bayes_mpt.predictors import Conditionals
from bayes_mpt.predictors.gaussian.process import JointGaussian
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.arguments import rows_of, spread_rows
from bayes_mpt.training.problem import (
    Problem,
    assign,
    flat,
    untouched,
)

__all__ = ["dimensionless", "metric", "only", "sampled", "shuffled", "small", "units"]

N_SCALE_PROBES = 4
N_SCALE_ROWS = 512  # of a program whose rows share its maps
N_UNIT_TOKENS = 512  # from which the units are found
MAX_WHITENED = 64  # parameters whose information matrix is taken whole


# ------------------------------------------------------------------------------------------- parts of a problem


def small(problem: Problem) -> Problem:
    """Of one long Gaussian vector, or of rows with masks of their own, as much as tells the units; or the problem."""
    if problem.masks is not None:
        some = spread_rows(len(problem.args[0]), N_SCALE_ROWS)
        return replace(problem, args=rows_of(problem.args, some), n_rows=len(some))
    if not problem.predictor.remembers:
        return problem
    if problem.predictor.divisible:
        return sampled(problem, N_UNIT_TOKENS, torch_generator(0))
    return only(problem, shuffled(problem, 0)[:N_UNIT_TOKENS])


def only(problem: Problem, tokens: Tensor) -> Problem:
    """The exact problem of these rows alone."""
    predictor, args = problem.predictor, rows_of(problem.args, tokens)
    assert predictor.model is not None
    joint = JointGaussian(predictor.model, predictor.structure)
    return Problem(joint, args, None, None, 1, problem.log_prior)


def sampled(problem: Problem, n_tokens: int, generator: torch.Generator) -> Problem:
    """The problem with its score estimated from random tokens."""
    read: Any = problem.read()
    some = read.sample(n_tokens, generator)
    return replace(problem, some=some)


def shuffled(problem: Problem, seed: int) -> Tensor:
    """The observed tokens of one vector in a random order."""
    y = problem.args[-1]
    tokens = (~y.isnan()).nonzero()[:, 0] if y.is_floating_point() else torch.arange(len(y), device=y.device)
    return tokens[torch.randperm(len(tokens), generator=torch_generator(seed)).to(tokens.device)]


def _n_tokens(problem: Problem) -> int:
    """Observed tokens of one vector."""
    return len(shuffled(problem, 0))


# ---------------------------------------------------------------------------------------------------- units


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


def units(problem: Problem, leaves: dict[str, Tensor], predictor: Conditionals | None = None) -> Tensor:
    """A step of one in each parameter should move the model by about one.

    Of a linear-Gaussian program: its dimensionless map, with J its Jacobian. Of others: the log-densities of the rows
    in units of sqrt N, J'J being the empirical Fisher information of a row. Over random signs v,
    E (J' v)_j^2 is sum_i J_ij^2.
    """
    if problem.predictor.climbs:  # one vector, of which no part is cheap to have alone
        return torch.ones_like(flat(leaves)).detach()
    predictor = problem.read() if predictor is None else predictor
    reading = predictor.linear_map() if problem.predictor.reads_map else None
    if reading is not None:
        outputs = torch.cat([part.flatten() for part in dimensionless(reading)])
    else:
        outputs = _by_part(problem, predictor)
        outputs = outputs / math.sqrt(len(outputs))
    generator = torch.Generator().manual_seed(0)
    square = torch.zeros_like(flat(leaves))
    for _ in range(N_SCALE_PROBES):
        sign = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), sign, retain_graph=True, materialize_grads=True
        )
        square += torch.cat([g.flatten() for g in grads]).square() / N_SCALE_PROBES
    for name, part in zip(leaves, square.split([v.numel() for v in leaves.values()]), strict=True):
        if part.numel() and not bool((part > 0).any()) and reading is not None:
            raise untouched(name)
    unit = torch.where(square > 0, square, torch.ones_like(square)).rsqrt().detach()
    # A constrained parameter moves through a logarithm or the like: one is far, and at a bound its slope is zero.
    bound = pyro.get_param_store().get_state()["constraints"]
    most = [
        torch.full_like(v.flatten(), math.inf if bound[n] is constraints.real else 1.0)
        for n, v in leaves.items()
    ]
    if problem.predictor.sampled or problem.predictor.structure.takes_visible:
        # What a few rows alone touch (a guide's own numbers for each row) would look flat: no further than its size.
        most.append(flat(leaves).detach().abs().clamp(min=1.0))
        return torch.minimum(unit, torch.minimum(torch.cat(most[:-1]), most[-1]))
    return torch.minimum(unit, torch.cat(most))


def metric(problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`units`, and of one Gaussian vector the matrix that whitens: in its units the information of all tokens is one.

    With mean m_i and variance v_i of each token given those before it, the information about the parameters is
    sum_i  dm_i dm_i' / v_i + 1/2 d(log v_i) d(log v_i)',  found by differences on some of the tokens.
    """
    part = small(problem)
    unit = units(part, leaves)
    if not problem.predictor.remembers or len(unit) > MAX_WHITENED:
        return unit, None
    start, step = flat(leaves).detach().clone(), 1e-3 * unit
    columns = []
    with torch.no_grad():
        _, var = _predicted(part, part.read())
        for k in range(len(start)):
            ends: list[Tensor] = []
            for sign in (1, -1):
                moved = start.clone()
                moved[k] += sign * step[k]
                assign(leaves, moved)
                mean_k, var_k = _predicted(part, part.read())
                ends.append(torch.cat([mean_k / var.sqrt(), var_k.log() * math.sqrt(0.5)]))
            columns.append((ends[0] - ends[1]) / 2e-3)
        assign(leaves, start)
    jacobian = torch.stack(columns, 1)  # (2B, D) in steps of the units
    if not bool(torch.isfinite(jacobian).all()):
        return unit, None
    weight = (
        part.some[1] if part.some is not None else jacobian.new_full((), _n_tokens(problem) / len(mean_k))
    )
    weight = weight.expand(len(mean_k)).repeat(2)
    information, vectors = torch.linalg.eigh(jacobian.mT @ (weight[:, None] * jacobian))
    # no step beyond the unit of a single parameter: where the data say nothing, nor does their information
    return unit, vectors * information.clamp(min=1.0).rsqrt()


def _predicted(part: Problem, read: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the tokens of a part of one vector."""
    x = read.value
    tokens = torch.arange(x.shape[1], device=x.device) if part.some is None else part.some[0]
    return read.predicted(tokens)


def _by_part(problem: Problem, read: Conditionals) -> Tensor:
    """Log-densities of rows; of one vector, of its tokens in turn."""
    if problem.predictor.remembers:
        mean, var = _predicted(problem, read)
        return math.sqrt(2) * torch.cat([mean / var.detach().sqrt(), var.log() * math.sqrt(0.5)])
    if problem.masks is not None:
        return problem.by_row(read)
    x = read.value
    if problem.predictor.structure.scores_input:
        read = read.at(x[:: -(-len(x) // N_SCALE_ROWS)])
    if len(read.value) > 1:
        return read.score()
    return read.chain(torch.arange(x.shape[1], device=x.device)[None]).flatten()
