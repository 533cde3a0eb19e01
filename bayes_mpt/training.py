"""Maximise a score over the parameters of a Pyro program.

Three ways, the first that fits: `concentrate` solves for mean, loadings and noise where the program leaves them free;
`climb` runs L-BFGS on the exact score; `train_on_masks` runs Adam on sampled masks. All work on the parameters that
stand in Pyro's parameter store at the time, in units found from the program itself, so that the path is the same
whatever the columns' scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, lsmr
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.distributions import constraints, transform_to

from bayes_mpt import concentrated
from bayes_mpt.affine import Reading
from bayes_mpt.masks import Policy, torch_generator
from bayes_mpt.moments import Table
from bayes_mpt.predictors import Conditionals, LinearGaussian
from bayes_mpt.predictors.errors import replicate_error
from bayes_mpt.predictors.joint_gaussian import JointGaussian
from bayes_mpt.score import OWN_MASKS, masked_score, training_masks
from bayes_mpt.tracing import MissingCovariate, ModelError, Program, has_missing, rows_of, spread_rows

__all__ = [
    "Fit",
    "Problem",
    "Report",
    "check_start",
    "climb",
    "concentrate",
    "one_thread",
    "stages",
    "take_rows",
    "total_on_masks",
    "train_on_masks",
]

Report = Callable[[int, float], bool]
"""Called with (iteration, mean score a row) after each; True stops the training."""

WINDOW = 50  # steps between two looks of the stopping rule, at first
WINDOW_GROWTH = 1.4  # with every halving of the step
MAX_HALVINGS = 6
STATIONARY = 1e-3  # nats a row and unit of the map: a steeper place is no maximum
FURTHEST = 3.0  # e-folds by which the size of a parameter changes at once
LEAST_GAIN = 2e-5  # nats a row in a window, less than which halves the step
N_CHECK_DRAWS = 16
N_TOTALS = 8  # replicates of a score from one mask a row
N_SCALE_PROBES = 4
N_SCALE_ROWS = 512  # of a program whose rows share its maps
OWN_STEPS = 100  # of a model's own way to climb: one that creeps is left to L-BFGS
# One Gaussian vector, coarse to fine:
N_COARSE = 512  # tokens, or a quarter of fewer, fitted exactly first, where many evaluations cost nothing
N_MIDDLE = 4096  # terms of a longer sum fitted next
N_UNIT_TOKENS = 512  # from which the units are found
MAX_TURNED = 64  # parameters whose information matrix is taken whole
GAIN_LEFT = 1e-3  # nats of all tokens


@dataclass(frozen=True)
class Problem:
    """What is maximised: the weighted score of these rows under this program."""

    predictor: Conditionals
    args: tuple[Any, ...]
    """What the program is called with when it is read."""
    rows: Tensor | None
    """(R, T) rows to score; None: the observed value of each reading."""
    weight: Tensor | None
    """(R,) of the rows; None: all one."""
    n_rows: int
    log_prior: Callable[[], Tensor] | None = None
    """Of the current parameters, added to the total score that is maximised."""
    some: tuple[Tensor, Tensor] | None = None
    """Tokens (B,) of a vector and their weights (B,), from which its score is estimated; None: all of it."""
    masks: Policy | None = None
    """What is scored, on one draw that stays, where no other masks are asked for; None: the joint density."""

    def read(self) -> Conditionals:
        """The predictor at the current parameters."""
        return self.predictor.read(self.args)

    def score(self, masks: Policy | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Mean score a row at the current parameters, exact or over one draw of masks; with the log prior."""
        if masks is None and self.predictor.climbs:
            score = self.predictor.objective(self.args).sum() / self.n_rows
        else:
            score = self.score_of(self.read(), masks, generator)
        return score if self.log_prior is None else score + self.log_prior() / self.n_rows

    def score_of(
        self, predictor: Conditionals, masks: Policy | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean score a row of a predictor that has read the program, without the log prior."""
        by_row = self.by_row(predictor, masks, generator)
        total = by_row.sum() if self.weight is None else self.weight @ by_row
        return total / self.n_rows

    def by_row(
        self, predictor: Conditionals, masks: Policy | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The score of each row (R,) of a predictor that has read the program."""
        x = predictor.value if self.rows is None else self.rows
        if self.some is not None:
            return predictor.partial(x, *self.some)
        masks = self.masks if masks is None else masks
        if masks is None:
            return predictor.joint(x)
        draw = training_masks(predictor, masks, x, torch_generator(0) if generator is None else generator)
        return masked_score(predictor, x, draw)

    def leaves(self) -> dict[str, Tensor]:
        """Unconstrained parameters of the program by name."""
        store = dict(pyro.get_param_store().named_parameters())
        return {name: store[name] for name in self.predictor.parameters}


@dataclass
class Fit:
    """How a training went."""

    method: str
    history: list[float] = field(default_factory=list)
    """Mean score a row after each iteration."""
    n_iter: int = 0
    converged: bool = False
    interrupted: bool = False
    last: Conditionals | None = None
    """The predictor at the fitted parameters, where it has been read; its score is the last of the history."""


# ------------------------------------------------------------------------------------------------- closed form


def concentrate(problem: Problem, table: Table, max_iter: int, tol: float) -> Fit | None:
    """Solve for mean, loadings and noise where the program leaves them free; None where it does not.

    Free means that the solution can be reached: each part has parameters of its own, and Gauss-Newton on them ends
    at the target. Nothing of the program's form is assumed. ``problem`` scores the rows of ``table``, all complete.

    Raises
    ------
    concentrated.NoiseFloorError
        If the likelihood has no maximum.
    """
    leaves = problem.leaves()
    _check_finite(leaves)
    if not isinstance(problem.predictor, LinearGaussian):
        return None
    reading = _exact(problem).reading
    loc, loading, noise = reading.loc, reading.loading, reading.noise
    n_latents = loading.shape[-1]
    if len(loc) != 1 or not table.n:
        return None
    touches = _touches(reading, leaves)
    for name in leaves:
        if leaves[name].numel() and not any(name in names for names in touches.values()):
            raise _untouched(name)
    of_loc, of_noise = touches["loc"], touches["noise"]
    of_loading = touches["loading"] - of_noise
    if of_loc & (of_noise | touches["loading"]) or not of_loc or (n_latents and not of_loading):
        return None
    cov = table.cov.cpu().numpy()
    n_noise = sum(leaves[n].numel() for n in of_noise)
    if n_noise == 1:
        if n_latents >= len(cov):
            return None
        factors = concentrated.proportional(cov, n_latents, noise[0].detach().cpu().numpy())
    elif n_noise >= len(cov):
        factors = concentrated.diagonal(cov, n_latents, max_iter=max_iter, tol=tol)
    else:
        return None
    target_loading = np.zeros((len(cov), n_latents))  # beyond T latents, columns of zeros
    target_loading[:, : factors.loading.shape[1]] = factors.loading
    before = {n: leaf.detach().clone() for n, leaf in leaves.items()}
    sd = table.cov.diagonal().sqrt()
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    as_tensor = lambda a: torch.as_tensor(np.ascontiguousarray(a)).to(loc)  # noqa: E731
    targets = {
        "noise": (as_tensor(np.log(factors.noise)), torch.ones_like(sd)),
        "loading": (as_tensor(target_loading), sd[:, None]),
        "loc": (table.mean, sd),
    }
    names = {"noise": sorted(of_noise), "loading": sorted(of_loading), "loc": sorted(of_loc)}
    # Where every part is its own parameter, or a rotation of it, one step along the transposed Jacobian arrives.
    _step_along_transpose(reading, leaves, targets)
    predictor = _exact(problem)
    if not all(_reached(predictor.reading, part, *target) for part, target in targets.items()):
        _restore(leaves, before)
        for part, (target, unit) in targets.items():
            if target.numel() and not _reach(problem, [leaves[n] for n in names[part]], part, target, unit):
                _restore(leaves, before)
                return None
        predictor = _exact(problem)
    with torch.no_grad():
        got = float(problem.score_of(predictor))
    if abs(got - factors.lml) > 1e-7 * (1 + abs(factors.lml)):
        _restore(leaves, before)
        return None
    return Fit("concentrated", [got], factors.n_iter, True)


def _part(reading: Reading, part: str) -> Tensor:
    """loc (T,), loading (T, K) or log noise (T,)."""
    out = getattr(reading, part)[0]
    return out.log() if part == "noise" else out


def _reached(reading: Reading, part: str, target: Tensor, unit: Tensor) -> bool:
    miss = (target - _part(reading, part)).detach().abs()
    return bool((miss <= 1e-11 * (unit + target.abs())).all())


def _step_along_transpose(
    reading: Reading, leaves: dict[str, Tensor], targets: dict[str, tuple[Tensor, Tensor]]
) -> None:
    outputs = [_part(reading, part) for part in targets]
    misses = [(t - out).detach() for out, (t, _) in zip(outputs, targets.values(), strict=True)]
    moving = [
        (out, miss) for out, miss in zip(outputs, misses, strict=True) if out.requires_grad and out.numel()
    ]
    grads = torch.autograd.grad(
        [out for out, _ in moving],
        list(leaves.values()),
        [miss for _, miss in moving],
        retain_graph=True,
        materialize_grads=True,
    )
    with torch.no_grad():
        for leaf, grad in zip(leaves.values(), grads, strict=True):
            leaf += grad


def _touches(reading: Reading, leaves: dict[str, Tensor]) -> dict[str, set[str]]:
    """Which parameters move which part of the map."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, set[str]] = {"loc": set(), "loading": set(), "noise": set()}
    pull: dict[str, dict[str, float]] = {name: {} for name in leaves}
    for part, out in zip(found, _dimensionless(reading), strict=True):
        if not out.requires_grad or not out.numel():
            continue
        probe = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        grads = torch.autograd.grad(out, list(leaves.values()), probe, retain_graph=True, allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            pull[name][part] = 0.0 if grad is None or not grad.numel() else float(grad.abs().max())
    for name, parts in pull.items():
        # a slope is a difference of two means: what cancels in it leaves a rounding error, no dependence
        strongest = max(parts.values(), default=0.0)
        for part, size in parts.items():
            if size > 1e-9 * strongest:
                found[part].add(name)
    return found


def _dimensionless(reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """loc and loading in units of what the other tokens leave unexplained of each token, and log noise."""
    with torch.no_grad():
        scaled = reading.loading / reading.noise[..., None]
        inner = scaled.mT @ reading.loading
        inner = inner + torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        # diag(S^-1) = 1/psi - diag(psi^-1 W C W' psi^-1)
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), scaled.mT, upper=False)
        unit = (1 / reading.noise - root.square().sum(-2)).rsqrt()
    return reading.loc / unit, reading.loading / unit[..., None], reading.noise.log()


def _reach(problem: Problem, leaves: list[Tensor], part: str, target: Tensor, unit: Tensor) -> bool:
    """Move these parameters until a part of the reading equals its target: Gauss-Newton, steps by LSMR."""
    sizes = [leaf.numel() for leaf in leaves]
    for _ in range(20):
        reading = _exact(problem).reading
        if _reached(reading, part, target, unit):
            return True
        out = _part(reading, part)
        miss = (target - out).detach()
        dummy = torch.zeros_like(out, requires_grad=True)
        pulled = torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(out, leaves, dummy, create_graph=True, materialize_grads=True)
            ]
        )

        def jvp(
            v: NDArray[np.float64], pulled: Tensor = pulled, dummy: Tensor = dummy
        ) -> NDArray[np.float64]:
            u = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).flatten().to(pulled)
            return torch.autograd.grad(pulled, dummy, u, retain_graph=True)[0].flatten().cpu().numpy()

        def vjp(v: NDArray[np.float64], out: Tensor = out) -> NDArray[np.float64]:
            u = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)).reshape(out.shape).to(out)
            grads = torch.autograd.grad(out, leaves, u, retain_graph=True, materialize_grads=True)
            return torch.cat([g.flatten() for g in grads]).cpu().numpy()

        jacobian = LinearOperator((out.numel(), sum(sizes)), matvec=jvp, rmatvec=vjp, dtype=np.float64)
        step = lsmr(jacobian, miss.flatten().cpu().numpy(), atol=1e-14, btol=1e-14, conlim=0, maxiter=100)[0]
        if not np.isfinite(step).all():
            return False
        parts = torch.as_tensor(step).split(sizes)
        with torch.no_grad():
            for leaf, change in zip(leaves, parts, strict=True):
                leaf += change.reshape(leaf.shape).to(leaf)
    return False


# ----------------------------------------------------------------------------------------------------- L-BFGS


def stages(problem: Problem, seed: int) -> list[Problem]:
    """The problem, behind smaller ones that lead to its maximum: of one long Gaussian vector, some of its tokens.

    First a few rows exactly, where restarts and many iterations are cheap; then, of a sum of terms, a random sample.
    """
    if not problem.predictor.remembers:
        return [problem]
    tokens = _shuffled(problem, seed)
    found = []
    if len(tokens) >= N_COARSE:
        found.append(_only(problem, tokens[: min(N_COARSE, len(tokens) // 4)]))
    if problem.predictor.divisible and len(tokens) >= 4 * N_MIDDLE:
        found.append(_sampled(problem, N_MIDDLE, torch_generator(seed)))
    return [*found, problem]


def _shuffled(problem: Problem, seed: int) -> Tensor:
    """The observed tokens of one vector in a random order."""
    y = problem.args[-1]
    tokens = (~y.isnan()).nonzero()[:, 0] if y.is_floating_point() else torch.arange(len(y), device=y.device)
    return tokens[torch.randperm(len(tokens), generator=torch_generator(seed)).to(tokens.device)]


def _n_tokens(problem: Problem) -> int:
    """Observed tokens of one vector."""
    return len(_shuffled(problem, 0))


def _only(problem: Problem, tokens: Tensor) -> Problem:
    """The exact problem of these rows alone."""
    predictor, args = problem.predictor, rows_of(problem.args, tokens)
    assert predictor.model is not None and isinstance(predictor.structure, Program)
    joint = JointGaussian(predictor.model, predictor.structure)
    return Problem(joint, args, None, None, 1, problem.log_prior)


def _sampled(problem: Problem, n_tokens: int, generator: torch.Generator) -> Problem:
    """The problem with its score estimated from random tokens."""
    some = problem.read().sample(n_tokens, generator)
    return replace(problem, some=some)


def climb(problem: Problem, *, max_iter: int, tol: float, report: Report | None = None) -> Fit:
    """Maximise the exact score by L-BFGS (strong Wolfe line search) over all parameters.

    A model may offer a method of its own, ``maximize(x, params, tol=, max_iter=)``, which takes complete rows and the
    values of the parameters by name and returns better ones (an EM, say). It goes first; where its end is no maximum to
    the tolerance, L-BFGS goes on from there.

    Raises
    ------
    ModelError
        If a parameter or its gradient is not finite at the start, or touches nothing; it is named.
    """
    leaves = problem.leaves()
    fit = Fit("lbfgs")
    own = _own_maximum(problem, leaves, tol, max_iter)
    predictor, score, grad = check_start(_small(problem) if problem.predictor.divisible else problem, leaves)
    if own:
        unit = _units(problem, leaves, predictor)
        fit.history, fit.n_iter, fit.last = [score], 1, predictor
        if float((unit * grad).abs().max()) <= _slope(tol, score):
            fit.method, fit.converged = "maximize, the model's own", True
            return fit
    fit.last = None
    best_theta, best = _flat(leaves).detach().clone(), -math.inf
    best_slope = torch.full_like(best_theta, math.inf)
    least_unit = torch.full_like(best_theta, math.inf)

    def climb_once(
        n_steps: int, move: Callable[[Tensor], Tensor], furthest: float | None = None, newton: bool = False
    ) -> bool:
        """L-BFGS over the steps phi (n_steps,) that move the parameters; whether it ended by itself.

        With ``newton`` the steps are such that the curvature is about one, and so the slope the best first step.
        """
        budget, scale = max_iter - len(fit.history), 1.0
        first: tuple[float, NDArray[np.float64]] | None = None

        def loss(phi: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            nonlocal best, best_theta, best_slope
            if first is not None and not phi.any():
                return first
            steps = (scale * torch.as_tensor(phi).to(best_theta)).requires_grad_()
            moved = move(steps)
            theta = moved.detach()
            _assign(leaves, theta)
            try:
                score = problem.score()
                grads = torch.autograd.grad(score, list(leaves.values()), materialize_grads=True)
            except MissingCovariate:
                raise
            except (
                ValueError,
                torch.linalg.LinAlgError,
            ):
                # the line search tried a point too far away; ModelError is a ValueError too
                return 1e30, np.zeros(len(phi))
            (grad,) = torch.autograd.grad(moved, steps, torch.cat([g.flatten() for g in grads]))
            value = float(score.detach())
            if not math.isfinite(value) or not bool(torch.isfinite(grad).all()):
                return 1e30, np.zeros(len(phi))
            if value > best:
                best, best_theta, best_slope = value, theta, grad
            return -value, -scale * grad.double().cpu().numpy()

        if newton:
            # L-BFGS takes a first step of length one: where the curvature is one, that of Newton's method
            value, slope = loss(np.zeros(n_steps))
            scale = float(np.linalg.norm(slope)) or 1.0
            first = value, scale * slope
        gtol = scale * math.sqrt(GAIN_LEFT) / 10 if newton else 1e-9
        options = {"maxiter": budget, "maxfun": 3 * budget, "maxcor": 30, "ftol": tol, "gtol": gtol}
        result = minimize(
            loss,
            np.zeros(n_steps),
            jac=True,
            method="L-BFGS-B",
            bounds=None if furthest is None else [(-furthest, furthest)] * n_steps,
            callback=callback,
            options=options,
        )
        _assign(leaves, best_theta)
        return result.status in (0, 2)  # and not out of iterations, or stopped from outside

    def callback(intermediate_result: Any) -> None:
        fit.history.append(-float(intermediate_result.fun))
        if report is not None and report(len(fit.history), fit.history[-1]):
            raise StopIteration

    try:
        while len(fit.history) < max_iter:
            before, (unit, turn) = best, _metric(problem, leaves)
            least_unit = torch.minimum(least_unit, unit)
            start = _flat(leaves).detach().clone()
            ended = climb_once(len(unit), _along(start, unit, turn), newton=turn is not None)
            if not math.isfinite(best):
                check_start(problem, leaves)
            if not ended:
                break
            # in turned units the curvature is about one
            if turn is not None and 0.5 * float(best_slope.square().sum()) <= GAIN_LEFT:
                fit.converged = True
                break
            # The units were those of the start; where the map has changed much, a climb may end short of the top.
            if best - before > 10 * tol * (1 + abs(best)):
                continue
            # Latents far too wide hide it: in units of the noise the slope is nothing, though the way down is long.
            rescaled, in_units = _rescaling(leaves), partial(torch.mul, least_unit)
            flat = max(STATIONARY, _slope(tol, best))
            if _steepest(problem, leaves, rescaled, len(leaves)) > flat:
                before = best
                # Not all the way at once: loadings of zero are a saddle.
                if not climb_once(len(leaves), rescaled, FURTHEST):
                    break
                if best - before > 10 * tol * (1 + abs(best)):
                    continue
            fit.converged = _steepest(problem, leaves, in_units, len(least_unit)) <= flat
            break
    except KeyboardInterrupt:
        fit.interrupted = True
    _assign(leaves, best_theta)
    fit.n_iter = len(fit.history)
    return fit


def _slope(tol: float, score: float) -> float:
    """Of a parameter in its unit, where a step of one curves the score by about one, with no more than tol to gain."""
    return math.sqrt(2 * tol * max(1.0, abs(score)))


def _own_maximum(problem: Problem, leaves: dict[str, Tensor], tol: float, max_iter: int) -> bool:
    """Let the model itself climb, if it offers to and no cell is missing."""
    maximize = getattr(problem.predictor.model, "maximize", None)
    if maximize is None or problem.rows is not None or any(has_missing(a) for a in problem.args):
        return False
    store = pyro.get_param_store()
    bounds = store.get_state()["constraints"]
    params = {name: store[name].detach() for name in leaves}
    with torch.no_grad():
        found = maximize(*problem.args, params, tol=tol, max_iter=min(max_iter, OWN_STEPS))
        for name, value in found.items():
            leaves[name].copy_(transform_to(bounds[name]).inv(value))
    return True


# ------------------------------------------------------------------------------------------------------- masks


def train_on_masks(
    problem: Problem,
    masks: Policy,
    *,
    max_iter: int,
    learning_rate: float,
    batch_size: int | None = None,
    random_state: int | None = None,
    tol: float = 0.0,
    report: Report | None = None,
) -> Fit:
    """Maximise the masked score by Adam, a fresh draw of masks each step.

    After every window of steps (50 at first, longer as the steps shrink) the average of its iterates is scored on one
    fixed draw of masks and rows, so that two windows are compared without the noise of the masks. A window that gains
    less than ``tol`` (at least 2e-5) nats a row halves the step; after six halvings the training ends at the best
    average. Units are taken afresh each window, since the map moves.

    Raises
    ------
    ModelError
        If a parameter or its gradient is not finite, or touches nothing; it is named.
    """
    generator = torch_generator(random_state)
    leaves = problem.leaves()
    fit = Fit("adam")
    check_start(problem if problem.masks is None else _small(problem), leaves)
    check_seed = int(torch.randint(2**31, (), generator=generator))

    def check() -> float:
        """The score on the fixed draw."""
        fixed = torch.Generator().manual_seed(check_seed)
        with torch.no_grad():
            draws = [_batch(problem, batch_size, fixed).score(masks, fixed) for _ in range(N_CHECK_DRAWS)]
        return float(torch.stack(draws).mean())

    best = _flat(leaves).detach().clone()
    best_check, rate, halvings, stopped = check(), learning_rate, 0, False
    try:
        while len(fit.history) < max_iter and halvings <= MAX_HALVINGS and not stopped:
            start, unit, phi, adam = _fresh_adam(problem, leaves, rate)
            total, n_steps = torch.zeros_like(start), 0
            window = round(WINDOW * WINDOW_GROWTH**halvings)
            try:
                for _ in range(min(window, max_iter - len(fit.history))):
                    score = _batch(problem, batch_size, generator).score(masks, generator)
                    value = float(score.detach())
                    if not math.isfinite(value):
                        check_start(problem, leaves)
                        raise ModelError(
                            f"the masked score became {value} at step {len(fit.history)}: lower learning_rate (now "
                            f"{learning_rate})"
                        )
                    grads = torch.autograd.grad(score, list(leaves.values()), materialize_grads=True)
                    phi.grad = -unit * torch.cat([g.flatten() for g in grads])
                    adam.step()
                    theta = start + unit * phi.detach()
                    _assign(leaves, theta)
                    total += theta
                    n_steps += 1
                    fit.history.append(value)
                    if report is not None and report(len(fit.history), value):
                        stopped = True
                        break
            except KeyboardInterrupt:
                fit.interrupted = stopped = True
            if not n_steps:
                break
            average = total / n_steps
            last = _flat(leaves).detach().clone()
            _assign(leaves, average)
            gain = check() - best_check
            if gain > 0:
                best, best_check = average, best_check + gain
            if gain > max(tol, LEAST_GAIN):
                _assign(leaves, last)
            elif n_steps == window:
                halvings += 1
                rate *= 0.5
                _assign(leaves, best)
    except KeyboardInterrupt:
        fit.interrupted = True
    _assign(leaves, best)
    fit.converged = halvings > MAX_HALVINGS
    fit.n_iter = len(fit.history)
    return fit


def total_on_masks(problem: Problem, predictor: Conditionals, seed: int) -> tuple[float, float]:
    """The total score of all rows and its standard error, from replicates of one random mask for each row.

    Unbiased for the area under the masked curve, whatever was trained on; masks are independent between rows, so that
    the error falls with their number.
    """
    generator = torch_generator(seed)
    totals = np.array([float(problem.by_row(predictor, OWN_MASKS, generator).sum()) for _ in range(N_TOTALS)])
    return float(totals.mean()), replicate_error(totals)


def _fresh_adam(
    problem: Problem, leaves: dict[str, Tensor], learning_rate: float
) -> tuple[Tensor, Tensor, Tensor, torch.optim.Adam]:
    """Start, units, the steps phi in theta = start + unit phi, and their optimiser."""
    start = _flat(leaves).detach().clone()
    phi = torch.zeros_like(start).requires_grad_()
    return (
        start,
        _units(_small(problem), leaves),
        phi,
        torch.optim.Adam([phi], lr=learning_rate, betas=(0.9, 0.99)),
    )


def _batch(problem: Problem, batch_size: int | None, generator: torch.Generator) -> Problem:
    """A random minibatch, whose mean score estimates that of all rows."""
    if batch_size is None:
        return problem
    log_prior = _share_of(problem.log_prior, batch_size / problem.n_rows)
    if problem.rows is not None:
        n = len(problem.rows)
        if problem.weight is None:
            index = torch.randperm(n, generator=generator)[:batch_size]
        else:
            index = torch.multinomial(problem.weight.cpu(), batch_size, replacement=True, generator=generator)
        index = index.to(problem.rows.device)
        return Problem(problem.predictor, problem.args, problem.rows[index], None, len(index), log_prior)
    if problem.predictor.divisible:
        return _sampled(problem, batch_size, generator)
    return take_rows(problem, torch.randperm(len(problem.args[0]), generator=generator)[:batch_size])


def take_rows(problem: Problem, index: Tensor) -> Problem:
    """The problem of some of its rows, whose mean score estimates that of all."""
    log_prior = _share_of(problem.log_prior, len(index) / problem.n_rows)
    args = rows_of(problem.args, index.to(problem.args[0].device))
    return replace(problem, args=args, n_rows=len(index), log_prior=log_prior)


def _share_of(log_prior: Callable[[], Tensor] | None, share: float) -> Callable[[], Tensor] | None:
    return None if log_prior is None else lambda: share * log_prior()


# ------------------------------------------------------------------------------------------------------- shared


def _exact(problem: Problem) -> LinearGaussian:
    """The linear-Gaussian map at the current parameters."""
    predictor = problem.read()
    if not isinstance(predictor, LinearGaussian):
        raise TypeError(f"this training needs a linear-Gaussian program, got {type(predictor).__name__}")
    return predictor


def _steepest(
    problem: Problem, leaves: dict[str, Tensor], move: Callable[[Tensor], Tensor], n_steps: int
) -> float:
    """The largest slope of the mean score, nats a row and step."""
    grads = torch.autograd.grad(problem.score(), list(leaves.values()), materialize_grads=True)
    steps = torch.zeros(n_steps).to(_flat(leaves)).requires_grad_()
    (slope,) = torch.autograd.grad(move(steps), steps, torch.cat([g.flatten() for g in grads]))
    return float(slope.abs().max())


def _rescaling(leaves: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Steps, one for each parameter, in the logarithm of its size: a factor, or of a bounded one a shift."""
    start = [leaf.detach().flatten().clone() for leaf in leaves.values()]
    bound = pyro.get_param_store().get_state()["constraints"]
    free = [bound[name] is constraints.real for name in leaves]

    def move(phi: Tensor) -> Tensor:
        return torch.cat([v * p.exp() if f else v + p for v, p, f in zip(start, phi, free, strict=True)])

    return move


def _flat(leaves: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves.values()])


def _assign(leaves: dict[str, Tensor], theta: Tensor) -> None:
    with torch.no_grad():
        for leaf, value in zip(
            leaves.values(), theta.split([v.numel() for v in leaves.values()]), strict=True
        ):
            leaf.copy_(value.reshape(leaf.shape))


def _restore(leaves: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(before[name])


def _units(problem: Problem, leaves: dict[str, Tensor], predictor: Conditionals | None = None) -> Tensor:
    """A step of one in each parameter should move the model by about one.

    Of a linear-Gaussian program: its dimensionless map, with J its Jacobian. Of others: the log-densities of the rows
    in units of sqrt N, J'J being the empirical Fisher information of a row. Over random signs v,
    E (J' v)_j^2 is sum_i J_ij^2.
    """
    if problem.predictor.climbs:  # one vector, of which no part is cheap to have alone
        return torch.ones_like(_flat(leaves)).detach()
    predictor = problem.read() if predictor is None else predictor
    if isinstance(predictor, LinearGaussian):
        outputs = torch.cat([part.flatten() for part in _dimensionless(predictor.reading)])
    else:
        outputs = _by_part(problem, predictor)
        outputs = outputs / math.sqrt(len(outputs))
    generator = torch.Generator().manual_seed(0)
    square = torch.zeros_like(_flat(leaves))
    for _ in range(N_SCALE_PROBES):
        sign = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), sign, retain_graph=True, materialize_grads=True
        )
        square += torch.cat([g.flatten() for g in grads]).square() / N_SCALE_PROBES
    for name, part in zip(leaves, square.split([v.numel() for v in leaves.values()]), strict=True):
        if part.numel() and not bool((part > 0).any()) and isinstance(predictor, LinearGaussian):
            raise _untouched(name)
    unit = torch.where(square > 0, square, torch.ones_like(square)).rsqrt().detach()
    # A constrained parameter moves through a logarithm or the like: one is far, and at a bound its slope is zero.
    bound = pyro.get_param_store().get_state()["constraints"]
    most = [
        torch.full_like(v.flatten(), math.inf if bound[n] is constraints.real else 1.0)
        for n, v in leaves.items()
    ]
    if predictor.sampled or predictor.own_masks:
        # What a few rows alone touch (a guide's own numbers for each row) would look flat: no further than its size.
        most.append(_flat(leaves).detach().abs().clamp(min=1.0))
        return torch.minimum(unit, torch.minimum(torch.cat(most[:-1]), most[-1]))
    return torch.minimum(unit, torch.cat(most))


def _along(start: Tensor, unit: Tensor, turn: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Parameters after steps phi in these units: start + unit * (turn phi)."""
    return lambda phi: start + unit * (phi if turn is None else turn @ phi)


def _metric(problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`_units`, and of one Gaussian vector the turn in whose units the information of all tokens is one.

    With mean m_i and variance v_i of each token given those before it, the information about the parameters is
    sum_i  dm_i dm_i' / v_i + 1/2 d(log v_i) d(log v_i)',  found by differences on some of the tokens.
    """
    part = _small(problem)
    unit = _units(part, leaves)
    if not problem.predictor.remembers or len(unit) > MAX_TURNED:
        return unit, None
    start, step = _flat(leaves).detach().clone(), 1e-3 * unit
    columns = []
    with torch.no_grad():
        _, var = _predicted(part, part.read())
        for k in range(len(start)):
            ends: list[Tensor] = []
            for sign in (1, -1):
                moved = start.clone()
                moved[k] += sign * step[k]
                _assign(leaves, moved)
                mean_k, var_k = _predicted(part, part.read())
                ends.append(torch.cat([mean_k / var.sqrt(), var_k.log() * math.sqrt(0.5)]))
            columns.append((ends[0] - ends[1]) / 2e-3)
        _assign(leaves, start)
    jacobian = torch.stack(columns, 1)  # (2B, D) in steps of the units
    if not bool(torch.isfinite(jacobian).all()):
        return unit, None
    weight = (
        part.some[1] if part.some is not None else jacobian.new_full((), _n_tokens(problem) / len(mean_k))
    )
    weight = weight.expand(len(mean_k)).repeat(2)
    information, turn = torch.linalg.eigh(jacobian.mT @ (weight[:, None] * jacobian))
    # no step beyond the unit of a single parameter: where the data say nothing, nor does their information
    return unit, turn * information.clamp(min=1.0).rsqrt()


def _small(problem: Problem) -> Problem:
    """Of one long Gaussian vector, or of rows with masks of their own, as much as tells the units; or the problem."""
    if problem.masks is not None:
        some = spread_rows(len(problem.args[0]), N_SCALE_ROWS)
        return replace(problem, args=rows_of(problem.args, some), n_rows=len(some))
    if not problem.predictor.remembers:
        return problem
    if problem.predictor.divisible:
        return _sampled(problem, N_UNIT_TOKENS, torch_generator(0))
    return _only(problem, _shuffled(problem, 0)[:N_UNIT_TOKENS])


def _predicted(part: Problem, predictor: Conditionals) -> tuple[Tensor, Tensor]:
    """Mean and variance of the tokens of a part of one vector."""
    x = predictor.value
    tokens = torch.arange(x.shape[1], device=x.device) if part.some is None else part.some[0]
    return predictor.predicted(x, tokens)


def _by_part(problem: Problem, predictor: Conditionals) -> Tensor:
    """Log-densities of rows; of one vector, of its tokens in turn."""
    if predictor.remembers:
        mean, var = _predicted(problem, predictor)
        return math.sqrt(2) * torch.cat([mean / var.detach().sqrt(), var.log() * math.sqrt(0.5)])
    x = predictor.value
    if problem.masks is not None:
        return problem.by_row(predictor)
    if predictor.structure.plain:
        x = x[:: -(-len(x) // N_SCALE_ROWS)]
    if len(x) > 1:
        return predictor.joint(x)
    return predictor.chain(x, torch.arange(x.shape[1], device=x.device)[None]).flatten()


def _untouched(name: str) -> ModelError:
    return ModelError(
        f"parameter {name!r} does not touch the score: nothing in the observed site depends on it, or only through "
        ".detach(). Remove it, or use it"
    )


def _check_finite(leaves: dict[str, Tensor]) -> None:
    for name, leaf in leaves.items():
        if not bool(torch.isfinite(leaf).all()):
            raise ModelError(f"parameter {name!r} is not finite at the start: check its initial value")


def check_start(problem: Problem, leaves: dict[str, Tensor]) -> tuple[Conditionals, float, Tensor]:
    """The predictor read, its score and gradient, both finite."""
    _check_finite(leaves)
    predictor = problem.read()
    score = problem.score_of(predictor)
    if not leaves:
        raise ModelError("the program has no pyro.param: there is nothing to train")
    if not bool(torch.isfinite(score)):
        raise ModelError(f"the score is {float(score.detach())} at the start: check the program and its data")
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if score.requires_grad:
        grads = torch.autograd.grad(score, list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is None:
            raise _untouched(name)
        if not bool(torch.isfinite(grad).all()):
            raise ModelError(f"the gradient of parameter {name!r} is not finite at the start")
    return predictor, float(score.detach()), torch.cat([g.flatten() for g in grads if g is not None])


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_thread(n_cells: int) -> Iterator[None]:
    """One thread around small algebra, where handing work to threads costs more than the work; then as before."""
    if n_cells > 2**21:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _threads().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
