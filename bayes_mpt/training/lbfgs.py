"""Climb the exact score by L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import constraints, transform_to

from bayes_mpt.program.arguments import has_missing
from bayes_mpt.program.offers import offered, offered_of_itself
from bayes_mpt.program.program import MissingCovariate
from bayes_mpt.training.problem import (
    Fit,
    Problem,
    Report,
    assign,
    check_start,
    flat,
)
from bayes_mpt.training.units import metric, units

__all__ = ["maximize_lbfgs"]

OWN = "maximize, the model's own"
STATIONARY = 1e-3  # nats a row and unit of the map: a steeper place is no maximum
FURTHEST = 3.0  # e-folds by which the size of a parameter changes at once
SETTLING_STEPS = 20  # of a model's own way, where L-BFGS has ended
MAX_SETTLINGS = 5  # climbs, where it gains and L-BFGS was stuck
ENOUGH = 10.0  # tolerances that it may gain at an end
OWN_STEPS = 1000  # of a model's own way to climb: one that creeps is left to L-BFGS
GAIN_LEFT = 1e-3  # nats of all tokens


def maximize_lbfgs(problem: Problem, *, max_iter: int, tol: float, report: Report | None = None) -> Fit:
    """Maximise the exact score by L-BFGS (strong Wolfe line search) over all parameters.

    A model may offer a method of its own, ``maximize(x, params, tol=, max_iter=)``, which takes rows (complete ones, or
    also others if it says ``maximizes_missing``) and the values of the parameters by name and returns better ones (an
    EM, say). It goes first; where its end is no maximum to the tolerance, L-BFGS goes on from there, and what it finds
    is taken if it gains more than that. At Ctrl-C it may raise ``KeyboardInterrupt(params)`` with the best so far.

    Raises
    ------
    ModelError
        If a parameter or its gradient is not finite at the start, or touches nothing; it is named.
    """
    leaves = problem.leaves()
    fit = Fit("lbfgs")
    own, fit.interrupted, left = _own_maximum(problem, leaves, tol, max_iter)
    if own and not fit.interrupted and _at_own_end(problem, fit, left, tol):
        return fit
    read, score, grad = check_start(problem, leaves, problem.whole if own else problem.objective.trial)
    if own:
        fit.history, fit.n_iter = [score], 1
        try:
            if not fit.interrupted:
                unit = units(problem.objective, leaves, read)
                fit.converged = float((unit * grad).abs().max()) <= _slope(tol, score)
        except KeyboardInterrupt:
            fit.interrupted = True
        if fit.interrupted or fit.converged:
            fit.method, fit.last = OWN, read
            return fit
    ended = flat(leaves).detach().clone()
    climb = _Climb(problem, leaves, fit, max_iter, tol, report)
    try:
        climb.run()
    except KeyboardInterrupt:
        if not fit.history:
            raise
        fit.interrupted, fit.converged = True, False
    if own and not fit.interrupted and climb.best - score <= tol * max(1.0, abs(score)):
        # nothing to gain to the tolerance: where the score is flat, the climb may have gone any way
        assign(leaves, ended)
        fit.method, fit.last, fit.history, fit.n_iter, fit.converged = OWN, read, [score], 1, True
        return fit
    assign(leaves, climb.best_theta)
    for _ in range(MAX_SETTLINGS if own else 0):
        if fit.interrupted or not _settle(problem, leaves, fit, climb, tol):
            break
        try:
            climb.run()
        except KeyboardInterrupt:
            fit.interrupted, fit.converged = True, False
        assign(leaves, climb.best_theta)
    fit.n_iter = len(fit.history)
    return fit


def _settle(problem: Problem, leaves: dict[str, Tensor], fit: Fit, climb: _Climb, tol: float) -> bool:
    """Let the model itself have the last word, if that loses nothing: where the score is flat, L-BFGS may go far.

    Where it gains nothing either, no way is left that does: that is an end, however steep a narrow ridge may look.
    Whether it gains where L-BFGS was stuck, and should be asked again.
    """
    _, fit.interrupted, _ = _own_maximum(problem, leaves, tol, SETTLING_STEPS)
    with torch.no_grad():
        gain, level = float(problem.score()) - climb.best, tol * max(1.0, abs(climb.best))
    if not gain >= -level:
        assign(leaves, climb.best_theta)
        return False
    climb.best, climb.best_theta = climb.best + gain, flat(leaves).detach().clone()
    if not climb.stuck or fit.interrupted or fit.converged:
        return False
    fit.converged = gain <= ENOUGH * level
    return not fit.converged


class _Climb:
    """One climb under way: the best that it has come to, and the ways to go on from there."""

    def __init__(
        self,
        problem: Problem,
        leaves: dict[str, Tensor],
        fit: Fit,
        max_iter: int,
        tol: float,
        report: Report | None,
    ):
        self.problem, self.leaves, self.fit = problem, leaves, fit
        self.max_iter, self.tol, self.report = max_iter, tol, report
        self.best_theta, self.best = flat(leaves).detach().clone(), -math.inf
        self.best_slope = torch.full_like(self.best_theta, math.inf)
        self.least_unit = torch.full_like(self.best_theta, math.inf)
        self.stuck = False
        """Whether neither units of the outputs nor those of the parameters have let it gain more."""

    def run(self) -> None:
        """Climb again and again, each time in the units of the place, until that gains nothing."""
        fit, problem, leaves = self.fit, self.problem, self.leaves
        while len(fit.history) < self.max_iter:
            before, (unit, whiten) = self.best, metric(problem.objective, leaves)
            self.least_unit = torch.minimum(self.least_unit, unit)
            start = flat(leaves).detach().clone()
            ended = self.once(len(unit), _along(start, unit, whiten), newton=whiten is not None)
            if not math.isfinite(self.best):
                check_start(problem, leaves)
            if not ended:
                return
            # in whitened units the curvature is about one
            if whiten is not None and 0.5 * float(self.best_slope.square().sum()) <= GAIN_LEFT:
                fit.converged = True
                return
            # The units were those of the start; where the map has changed much, a climb may end short of the top.
            if not self._gained(before) and not self._rescaled():
                return

    def once(
        self,
        n_steps: int,
        move: Callable[[Tensor], Tensor],
        furthest: float | None = None,
        newton: bool = False,
    ) -> bool:
        """L-BFGS over the steps phi (n_steps,) that move the parameters; whether it ended by itself.

        With ``newton`` the steps are such that the curvature is about one, and so the slope the best first step.
        """
        budget, scale = self.max_iter - len(self.fit.history), 1.0
        first: tuple[float, NDArray[np.float64]] | None = None

        def loss(phi: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            if first is not None and not phi.any():
                return first
            return self._loss(phi, scale, move)

        if newton:
            # L-BFGS takes a first step of length one: where the curvature is one, that of Newton's method
            value, slope = loss(np.zeros(n_steps))
            scale = float(np.linalg.norm(slope)) or 1.0
            first = value, scale * slope
        gtol = scale * math.sqrt(GAIN_LEFT) / 10 if newton else 1e-9
        options = {"maxiter": budget, "maxfun": 3 * budget, "maxcor": 30, "ftol": self.tol, "gtol": gtol}
        result = minimize(
            loss,
            np.zeros(n_steps),
            jac=True,
            method="L-BFGS-B",
            bounds=None if furthest is None else [(-furthest, furthest)] * n_steps,
            callback=self._tell,
            options=options,
        )
        assign(self.leaves, self.best_theta)
        return result.status in (0, 2)  # and not out of iterations, or stopped from outside

    def _loss(
        self, phi: NDArray[np.float64], scale: float, move: Callable[[Tensor], Tensor]
    ) -> tuple[float, NDArray[np.float64]]:
        """Minus the score at the parameters after steps scale * phi, and its slope in phi; keeps the best."""
        steps = (scale * torch.as_tensor(phi).to(self.best_theta)).requires_grad_()
        moved = move(steps)
        theta = moved.detach()
        assign(self.leaves, theta)
        try:
            score = self.problem.score()
            grads = torch.autograd.grad(score, list(self.leaves.values()), materialize_grads=True)
        except MissingCovariate:
            raise
        except (ValueError, torch.linalg.LinAlgError):
            # the line search tried a point too far away; ModelError is a ValueError too
            return 1e30, np.zeros(len(phi))
        (grad,) = torch.autograd.grad(moved, steps, torch.cat([g.flatten() for g in grads]))
        value = float(score.detach())
        if not math.isfinite(value) or not bool(torch.isfinite(grad).all()):
            return 1e30, np.zeros(len(phi))
        if value > self.best:
            self.best, self.best_theta, self.best_slope = value, theta, grad
        return -value, -scale * grad.double().cpu().numpy()

    def _tell(self, intermediate_result: Any) -> None:
        """After each iteration."""
        history = self.fit.history
        history.append(-float(intermediate_result.fun))
        if self.report is not None and self.report(len(history), history[-1]):
            raise StopIteration

    def _gained(self, before: float) -> bool:
        """Whether the score has risen by what makes another climb worth while."""
        return self.best - before > 10 * self.tol * (1 + abs(self.best))

    def _rescaled(self) -> bool:
        """Climb in the sizes of the parameters where these still slope; whether to go on, else says how it ended.

        Latents far too wide hide a slope: in units of the noise it is nothing, though the way down is long.
        """
        problem, leaves = self.problem, self.leaves
        rescaled, in_units = _rescaling(leaves), partial(torch.mul, self.least_unit)
        level = max(STATIONARY, _slope(self.tol, self.best))
        if _max_slope(problem, leaves, rescaled, len(leaves)) > level:
            before = self.best
            # Not all the way at once: loadings of zero are a saddle.
            if not self.once(len(leaves), rescaled, FURTHEST):
                return False
            if self._gained(before):
                return True
        self.fit.converged = _max_slope(problem, leaves, in_units, len(self.least_unit)) <= level
        self.stuck = True
        return False


def _along(start: Tensor, unit: Tensor, whiten: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Parameters after steps phi in these units: start + unit * (whiten phi)."""
    return lambda phi: start + unit * (phi if whiten is None else whiten @ phi)


def _slope(tol: float, score: float) -> float:
    """Of a parameter in its unit, where a step of one curves the score by about one, with no more than tol to gain."""
    return math.sqrt(2 * tol * max(1.0, abs(score)))


def _own_maximum(
    problem: Problem, leaves: dict[str, Tensor], tol: float, max_iter: int
) -> tuple[bool, bool, float]:
    """Let the model itself climb, if it offers to for such rows: whether it did, was interrupted, what it says is left.

    That is nats a row; infinite where it does not say.
    """
    maximize, whole = offered(problem.bound.model, "maximize"), problem.whole
    climb = offered_of_itself(problem.bound.model, "climb")
    if maximize is None or whole.rows is not None:
        return False, False, math.inf
    if not offered(problem.bound.model, "maximizes_missing") and any(has_missing(a) for a in whole.args):
        return False, False, math.inf
    store = pyro.get_param_store()
    bounds = store.get_state()["constraints"]
    params = {name: store[name].detach() for name in leaves}
    with torch.no_grad():
        interrupted, left = False, math.inf
        try:
            if climb is None:
                found = maximize(*whole.args, params, tol=tol, max_iter=min(max_iter, OWN_STEPS))
            else:
                found, left = climb(*whole.args, params, tol=tol, max_iter=min(max_iter, OWN_STEPS))
        except KeyboardInterrupt as press:
            if not press.args:
                raise
            interrupted, found = True, press.args[0]
        for name, value in found.items():
            leaves[name].copy_(transform_to(bounds[name]).inv(value))
    return True, interrupted, left


@torch.no_grad()
def _at_own_end(problem: Problem, fit: Fit, left: float, tol: float) -> bool:
    """Whether the model knows that it has climbed to the tolerance, by what is left; the fit says so then."""
    if not math.isfinite(left):
        return False
    try:
        read = problem.objective.read()
        score = float(problem.with_prior(problem.score_of(read)))
    except KeyboardInterrupt:
        fit.interrupted = True
        return False
    if not left <= tol * max(1.0, abs(score)) < math.inf:
        return False
    fit.method, fit.last, fit.history, fit.n_iter, fit.converged = OWN, read, [score], 1, True
    return True


def _max_slope(
    problem: Problem, leaves: dict[str, Tensor], move: Callable[[Tensor], Tensor], n_steps: int
) -> float:
    """The largest slope of the mean score, nats a row and step."""
    grads = torch.autograd.grad(problem.score(), list(leaves.values()), materialize_grads=True)
    steps = torch.zeros(n_steps).to(flat(leaves)).requires_grad_()
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
