"""Exact conditionals of programs whose observations are one Gaussian vector: Gaussian processes.

    y ~ N(loc(x), cov(x)),    log p(y) = -1/2 r' cov^-1 r - 1/2 log det cov - T/2 log 2 pi,    r = y - loc

The tokens are the observations. One Cholesky factor of the covariance gives every chain of conditionals; no jitter is
ever added to it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from pyro.poutine import substitute
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayes_mpt.masks import Policy
from bayes_mpt.predictors.base import Bound, Conditionals, Leaves, Posterior, Predictive
from bayes_mpt.predictors.objective import N_TRIAL_OUTPUTS, Batch, Objective, Outputs
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import changes, fill_all, has_missing, rows_of, spread_rows
from bayes_mpt.program.checks import refuse_unregistered
from bayes_mpt.program.missing import nan_shows
from bayes_mpt.program.offers import ANOTHER_PROGRAM, offered_of_itself
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import FAILURES, run
from bayes_mpt.program.sites import base, described, own_shown
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.trials import CLOSE

__all__ = [
    "GaussianVectors",
    "JointGaussian",
    "cholesky",
    "coarse",
    "gaussian_program",
    "is_gaussian_vector",
    "missing_of",
    "moments",
    "outputs_of_tokens",
    "shuffled",
]

LOG_2PI = math.log(2 * math.pi)
N_COARSE = 512  # tokens, or a quarter of fewer, fitted exactly first, where many evaluations cost nothing
N_TRIAL_ROWS = 64  # rows on which it is found out what the program is
NOT_DEFINITE = (
    "the covariance of the observations is not positive definite in float64: rows repeat and there is no "
    "noise, a hyper-parameter is out of range, or the kernel is not a valid covariance. Give the observations noise"
)


class Moments(NamedTuple):
    """Mean and covariance of all observations of one run."""

    loc: Tensor
    """(T,)"""
    cov: Tensor
    """(T, T)"""
    value: Tensor
    """(1, T) NaN where missing."""


class _Few(NamedTuple):
    """A run on a few rows, which observes one Gaussian vector over these and nothing else."""

    rows: tuple[Any, ...]
    trace: Trace
    node: Any
    """The observed site."""


def _run_on_few(model: Model, args: tuple[Any, ...]) -> _Few | None:
    """None of a program that observes something else."""
    if len(args) < 2 or not all(isinstance(a, Tensor) and a.ndim for a in args[:2]):
        return None
    few = rows_of(args, spread_rows(len(args[0]), N_TRIAL_ROWS).to(args[0].device))
    try:
        trace = run(model, fill_all(few), labels=False)  # which are latents: this program has none
    except (RuntimeError, ValueError, IndexError):
        return None  # it says why where it is run on all its rows
    sites = [n for n in trace.nodes.values() if n["type"] == "sample"]
    if len(sites) != 1 or not sites[0]["is_observed"] or tuple(sites[0]["value"].shape) != (len(few[0]),):
        return None
    vector = isinstance(base(sites[0]["fn"]), torch.distributions.MultivariateNormal)
    return _Few(few, trace, sites[0]) if vector else None


def is_gaussian_vector(model: Model, args: tuple[Any, ...]) -> bool:
    """Whether a program observes one Gaussian vector over all rows and nothing else, as one run on a few shows."""
    return _run_on_few(model, args) is not None


def gaussian_program(model: Model, args: tuple[Any, ...]) -> Program | None:
    """What `analyze` finds of a program without latents whose one observed site is a Gaussian vector over all rows.

    Found on a few rows, since a run on all of them may build a matrix of N x N; None if it is something else.

    Raises
    ------
    ModelError
        If it is one, and cannot be scored.
    """
    found = _run_on_few(model, args)
    if found is None:
        return None
    few, trace, node = found
    last = len(few) - 1
    stated = _is_stated(model, few, node)
    if stated:
        program = described(trace, len(few[0]))
        refuse_unregistered([base(node["fn"]).loc, base(node["fn"]).covariance_matrix])
    else:
        try:
            with warnings.catch_warnings():
                # gpytorch's own density adds jitter, and says so; it is not what scores
                warnings.filterwarnings("ignore", message="A not p.d., added jitter")
                program = analyze(model, few)
        except RuntimeError as error:  # of the factor of the covariance
            raise ModelError(_too_large(node["value"]) or NOT_DEFINITE) from error
    if not bool(own_shown(node).all()):
        raise ModelError(
            f"a mask hides observed site {node['name']!r}, which is one Gaussian vector: take it away and leave "
            "missing observations NaN, which the package leaves out"
        )
    shows = few[last].is_floating_point() and (
        stated or nan_shows(model, fill_all(few), last, program, trace)
    )
    site = program.sites[0]._replace(shape=(len(args[0]),), n_joint=0)
    return program._replace(
        sites=(site,), depth=0, observed_argument=last if shows else None, gaussian_vector=True
    )


def _is_stated(model: Model, rows: tuple[Any, ...], node: Any) -> bool:
    """Whether the model states that it observes y, the last argument, as one Gaussian vector, and keeps to it.

    A run has y there, unweighted; one with another y and other random numbers has the same mean and covariance.
    """
    if not offered_of_itself(model, "gaussian_vector", ANOTHER_PROGRAM) or node["scale"] != 1.0:
        return False
    filled = fill_all(rows)
    if not torch.equal(node["value"], filled[-1].reshape(node["value"].shape).to(node["value"])):
        return False
    other = (*filled[:-1], next(changes(filled[-1], real=True)))
    try:
        with torch.no_grad(), own_random_state(1):
            again = base(run(model, other, labels=False).nodes[node["name"]]["fn"])
    except FAILURES:
        return False
    law, close = base(node["fn"]), CLOSE.get(filled[0].dtype, 1e-4)
    loc, cov = again.loc - law.loc, again.covariance_matrix - law.covariance_matrix
    size = law.covariance_matrix.abs().max()
    unit = size.sqrt() + law.loc.abs().max()
    return bool(loc.abs().max() <= close * unit) and bool(cov.abs().max() <= close * size)


def moments(model: Model, args: tuple[Any, ...], program: Program) -> Moments:
    """Run the program on these rows, with gradients to its parameters."""
    trace = run(model, fill_all(args), labels=False)
    node = trace.nodes[program.sites[0].name]
    fn = base(node["fn"])
    value = node["value"]
    value = torch.where(missing_of(args, program).reshape(value.shape), torch.nan, value.to(fn.loc))
    return Moments(fn.loc, fn.covariance_matrix, value.reshape(1, -1))


def missing_of(args: tuple[Any, ...], program: Program) -> Tensor:
    """Which observations are missing: those of the last argument, in its shape, where it is what is observed."""
    y = args[-1]
    if not has_missing(y):
        return torch.zeros(y.shape, dtype=torch.bool, device=y.device)
    if program.observed_argument is None:
        raise ModelError(
            f"the program fills in missing cells of observed site {program.observed!r} itself, or computes it from "
            "several: write obs=y with y the last argument, and leave the cells NaN. Missing cells are left out by the "
            "package"
        )
    return y.isnan()


class JointGaussian(Bound):
    """A program whose observations are a Gaussian vector, found to be one by running it, scored in closed form.

    Parameters
    ----------
    model : callable
        A Pyro program ``model(x, y)`` without latents that observes y (N,) as one MultivariateNormal.
    program : Program
        Its `gaussian_program`.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x, y):
    ...     cov = torch.exp(-torch.cdist(x, x)) + torch.eye(len(x), dtype=x.dtype)
    ...     pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), cov), obs=y)
    >>> args = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    >>> JointGaussian(model, gaussian_program(model, args)).read(args).score()  # N(0; 0, [[2, 1], [1, 2]])
    tensor([-2.3872], dtype=torch.float64)
    """

    name = "Exact"
    why = "the observations are one Gaussian vector, whose covariance the program gives"
    model: Model
    structure: Program

    def __init__(self, model: Model, program: Program):
        self.model = model
        self.structure = program

    def read(self, args: tuple[Any, ...]) -> GaussianVector:
        return GaussianVector(self.model, self.structure, args)

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        return [
            *([] if masks is not None else coarse(self, whole, seed)),
            Objective(self, whole, masks, outputs=outputs_of_vector),
        ]

    def read_at(self, args: tuple[Any, ...], values: dict[str, Tensor]) -> GaussianVectors:
        return GaussianVectors(
            substitute(self.model, data=values), self.structure, args, len(next(iter(values.values())))
        )


class GaussianVectors:
    """Observations that are one Gaussian vector under each of B values of the parameters, all in one run.

    Parameters
    ----------
    model : callable
        The program at these values.
    program : Program
        Its `gaussian_program`.
    args : tuple
        The rows.
    n_values : int
        B.
    """

    def __init__(self, model: Model, program: Program, args: tuple[Any, ...], n_values: int):
        self.model, self.program, self.args, self.n_values = model, program, args, n_values

    def score(self) -> Tensor:
        """Log-density of the observations (B,); -inf for none."""
        loc, cov, value = self._moments(self.args)
        residual = value - loc
        seen = ~residual[0].isnan()
        if not bool(seen.all()):
            residual, cov = residual[:, seen], cov[:, seen][..., seen]
        return _LogProb.apply(residual, cov)

    def predict(self, new: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Means and variances (B, M) of the observations of M new rows given those that were read."""
        both = tuple(
            torch.cat([a, b]) if isinstance(a, Tensor) else a for a, b in zip(self.args, new, strict=True)
        )
        loc, cov, value = self._moments(both)
        place = torch.arange(loc.shape[1], device=loc.device) < len(self.args[0])
        return _condition(loc, cov, value, ~value[0].isnan() & place, ~place)

    def _moments(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, T), covariances (B, T, T) and values (B, T) of all rows."""
        wide = tuple(a.expand(self.n_values, *a.shape) if isinstance(a, Tensor) else a for a in args)
        loc, cov, value = moments(self.model, wide, self.program)
        if loc.shape != (self.n_values, len(args[0])) or value.numel() != loc.numel():
            raise ModelError("the program cannot be evaluated at several values of its parameters at once")
        return loc, cov, value.reshape(loc.shape)


def shuffled(args: tuple[Any, ...], seed: int) -> Tensor:
    """The observed tokens of one vector in a random order."""
    y = args[-1]
    tokens = (~y.isnan()).nonzero()[:, 0] if y.is_floating_point() else torch.arange(len(y), device=y.device)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order.to(tokens.device)]


def coarse(bound: Bound, whole: Batch, seed: int) -> list[Objective]:
    """The exact density of a few rows of many, which leads to the maximum of all of them at little cost."""
    tokens = shuffled(whole.args, seed)
    if len(tokens) < N_COARSE:
        return []
    assert bound.model is not None
    few = rows_of(whole.args, tokens[: min(N_COARSE, len(tokens) // 4)])
    return [Objective(JointGaussian(bound.model, bound.structure), Batch(few, 1), outputs=outputs_of_vector)]


def outputs_of_vector(objective: Objective, read: Conditionals | None) -> Outputs:
    """Tokens of a few rows of one Gaussian vector, which tell the units."""
    tokens, bound = shuffled(objective.whole.args, 0), objective.bound
    assert bound.model is not None
    few = GaussianVector(
        bound.model, bound.structure, rows_of(objective.whole.args, tokens[:N_TRIAL_OUTPUTS])
    )
    mean, var = few.predicted(torch.arange(few.value.shape[1], device=few.value.device))
    return outputs_of_tokens(mean, var, mean.new_full((), len(tokens) / len(mean)).expand(len(mean)))


def outputs_of_tokens(mean: Tensor, var: Tensor, weight: Tensor) -> Outputs:
    """Of tokens (B,), each predicted from others, that stand for so many: their means and log variances."""
    spread = torch.cat([var.detach().sqrt(), torch.ones_like(var)])
    return Outputs(torch.cat([mean, var.log() * math.sqrt(0.5)]), spread=spread, weight=weight.repeat(2))


class GaussianVector(Conditionals):
    """Observations that are one Gaussian vector, with its mean and covariance."""

    structure: Program

    def __init__(self, model: Model, program: Program, args: tuple[Any, ...]):
        self.structure, self.scale = program, program.scale
        self.loc, self.cov, self.value = moments(model, args, program)
        self._model, self._args, self._leaves = model, args, Leaves(program.parameters)

    def conditionals(self, visible: Tensor) -> Tensor:
        loc, cov, x = self.loc, self.cov, self.value
        out = x.new_zeros(len(visible), *x.shape)
        for s, mask in enumerate(visible):
            for n, row in enumerate(x):
                seen = mask & ~row.isnan()
                hidden = ~mask & ~row.isnan()
                mean, var = _condition(loc, cov, row, seen, hidden)
                log_prob = -0.5 * ((row[hidden] - mean).square() / var + var.log() + LOG_2PI)
                out[s, n] = torch.zeros_like(row).masked_scatter(hidden, log_prob)
        return out

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        loc, cov, x = self.loc, self.cov, self.value
        out = []
        for tokens in order:
            rows = []
            for row in x:
                kept = tokens[~row[tokens].isnan()]
                # L L' = cov[order, order]:  log p(y_t | y_<t) = -(L^-1 r)_t^2 / 2 - log L_tt - log(2 pi) / 2
                root = cholesky(cov[kept][:, kept])
                white = torch.linalg.solve_triangular(root, (row - loc)[kept, None], upper=False)[:, 0]
                log_prob = -0.5 * (white.square() + LOG_2PI) - root.diagonal().log()
                rows.append(torch.zeros_like(row).index_copy(0, kept, log_prob))
            out.append(torch.stack(rows))
        return torch.stack(out)

    def _joint(self) -> Tensor:
        loc, cov, x = self.loc, self.cov, self.value
        out = []
        for row in x:
            seen = ~row.isnan()
            if bool(seen.all()):
                out.append(_LogProb.apply(row - loc, cov))
            else:
                out.append(_LogProb.apply((row - loc)[seen], cov[seen][:, seen]))
            if math.isinf(float(out[-1].detach())):
                raise ModelError(_too_large(row) or NOT_DEFINITE)
        return torch.stack(out)

    def predicted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of tokens (B,), each given those before it."""
        loc, cov, x = self.loc, self.cov, self.value
        kept = tokens[~x[0, tokens].isnan()]
        # y_t given y_<t:  mean = y_t - L_tt (L^-1 r)_t,  variance = L_tt^2
        root = cholesky(cov[kept][:, kept])
        white = torch.linalg.solve_triangular(root, (x[0] - loc)[kept, None], upper=False)[:, 0]
        return x[0, kept] - root.diagonal() * white, root.diagonal().square()

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        loc, cov, x = self.loc, self.cov, self.value
        shown = ~x.isnan() if visible is None else ~x.isnan() & visible
        tokens = []
        for row, seen in zip(x, shown, strict=True):
            mean, _ = _condition(loc, cov, row, seen, ~seen)
            tokens.append(torch.where(seen, row, 0.0).masked_scatter(~seen, mean))
        return Posterior(x.new_zeros(len(x), 0), torch.stack(tokens))

    def predict(self, new: tuple[Any, ...], *, full: bool = False) -> Predictive:
        self._leaves.refuse_others()
        seen = self._args
        both = tuple(
            torch.cat([a, b]) if isinstance(a, Tensor) else a for a, b in zip(seen, new, strict=True)
        )
        loc, cov, value = moments(self._model, both, self.structure)
        shown = ~value[0].isnan()
        shown[len(seen[0]) :] = False
        hidden = torch.arange(len(seen[0]), len(shown), device=shown.device)
        # m_h + C_hs C_ss^-1 r_s,    C_hh - C_hs C_ss^-1 C_sh
        root = cholesky(cov[shown][:, shown])
        across = torch.linalg.solve_triangular(root, cov[shown][:, hidden], upper=False)
        white = torch.linalg.solve_triangular(root, (value[0] - loc)[shown, None], upper=False)
        mean = loc[hidden] + (across.mT @ white)[:, 0]
        whole = cov[hidden][:, hidden] - across.mT @ across if full else None
        return Predictive(mean, cov.diagonal()[hidden] - across.square().sum(0), whole)


class _LogProb(torch.autograd.Function):
    """log N(r; 0, cov) of one vector or several, with the gradient in closed form: one inverse, not the factor's rules.

    d/d cov = 1/2 (a a' - cov^-1),    d/d r = -a,    a = cov^-1 r

    -inf, with no gradient to be used, where the covariance is not positive definite.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, cov: Tensor) -> Tensor:
        root, info = torch.linalg.cholesky_ex(cov)  # ([B,] T, T)
        failed = (info != 0)[..., None, None]
        if bool(failed.any()):
            root = torch.where(failed, torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device), root)
        white = torch.linalg.solve_triangular(root, residual[..., None], upper=False)
        ctx.save_for_backward(root, white)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_prob = -0.5 * (white.square().sum((-2, -1)) + log_det + residual.shape[-1] * LOG_2PI)
        return torch.where(info == 0, log_prob, -math.inf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        root, white = ctx.saved_tensors
        a = torch.linalg.solve_triangular(root.mT, white, upper=True)  # ([B,] T, 1)
        by_cov = None
        if ctx.needs_input_grad[1]:
            by_cov = (a @ a.mT).sub_(torch.cholesky_inverse(root)).mul_(0.5 * grad[..., None, None])
        return -grad[..., None] * a[..., 0], by_cov


def _condition(loc: Tensor, cov: Tensor, row: Tensor, seen: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of the hidden tokens, each alone, given the seen ones of a row ([B,] T)."""
    # m_h + C_hs C_ss^-1 r_s,    C_hh - C_hs C_ss^-1 C_sh
    root = cholesky(cov[..., seen, :][..., seen])
    across = torch.linalg.solve_triangular(root, cov[..., seen, :][..., hidden], upper=False)
    white = torch.linalg.solve_triangular(root, (row - loc)[..., seen, None], upper=False)
    mean = loc[..., hidden] + (across.mT @ white)[..., 0]
    own = cov.diagonal(dim1=-2, dim2=-1)[..., hidden]
    return mean, own - across.square().sum(-2)


def _too_large(row: Tensor) -> str:
    """That an observation (T,) is so large that its square overflows, in words; empty where none is."""
    largest = float(row.detach().nan_to_num().abs().max())
    if largest < float(torch.finfo(row.dtype).max) ** 0.5:
        return ""
    return (
        f"an observation is as large as {largest:.3g}, whose square no float holds: rescale y, or correct it"
    )


def cholesky(cov: Tensor) -> Tensor:
    """Lower factors of covariances ([B,] T, T), or an error that says what to do."""
    root, info = torch.linalg.cholesky_ex(cov)
    if bool(info.any()):
        raise ModelError(NOT_DEFINITE)
    return root
