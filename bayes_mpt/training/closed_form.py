"""Mean, loadings and noise solved for, where a program leaves them free."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor
from torch.distributions import transform_to

from bayes_mpt.predictors import Conditionals
from bayes_mpt.predictors.gaussian import incomplete, profile
from bayes_mpt.predictors.gaussian.factors import FLOOR
from bayes_mpt.predictors.gaussian.linear import dimensionless
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.program import Parts
from bayes_mpt.program.statistics import SufficientStatistics
from bayes_mpt.program.store import save
from bayes_mpt.training.problem import (
    Fit,
    Problem,
    check_finite,
    restore,
    untouched,
)

__all__ = ["maximize_profile"]


def maximize_profile(
    problem: Problem,
    max_iter: int,
    tol: float,
    *,
    n_init: int = 1,
    seed: int = 0,
    at_floor: bool = False,
) -> Fit | None:
    """Solve for mean, loadings and noise where the program leaves them free; None where it does not.

    Free means that the solution can be reached: each part has parameters of its own, and Gauss-Newton on them ends
    at the target. Nothing of the program's form is assumed. ``problem`` has moments of its rows; a prior may be one of
    noise variances (`NoisePrior`), which is then maximised with it. Where cells are missing the maximum has
    no closed form: climbs go there from ``n_init`` starts (`incomplete`).
    ``at_floor``: where the likelihood of complete rows has no maximum for want of noise, take one of the size of
    rounding errors.

    Raises
    ------
    profile.NoiseFloorError, incomplete.FewCellsError
        If the likelihood has no maximum.
    KeyboardInterrupt
        By Ctrl-C before EM has come anywhere, or to where the program cannot follow; else the fit says so.
    """
    check_finite(problem.leaves())
    statistics = problem.statistics
    free = None if statistics is None else _free(problem, statistics)
    if statistics is None or free is None:
        return None
    wrong = None
    if free.shape is None and not statistics.complete:
        incomplete.refuse_constant_columns(statistics)
        # a prior that has no weight at zero outweighs the few cells of a column, but has no unit for a single one
        wrong = incomplete.too_few(statistics, free.n_latents if free.prior is None else 0)
    if statistics.complete:
        moments, factors = statistics, _of_complete_rows(statistics, free, max_iter, tol, at_floor)
    else:
        moments = statistics.available()
        steps = 1 if wrong else max_iter
        factors = incomplete.maximise(
            statistics,
            free.n_latents,
            free.shape,
            prior=free.prior,
            n_init=n_init,
            seed=seed,
            max_iter=steps,
            tol=tol,
        )
    if free.prior is not None and free.shape is None:
        _refuse_floor(factors.noise, moments)
    # a noise of the size of rounding errors sees these
    off = 1e-3 if at_floor else 1e-7 if statistics.complete else 1e-5
    moved = _move_to(problem, free, factors, moments, off)
    if moved is None:
        if factors.interrupted:  # another climb may get there, unless this one was interrupted
            raise KeyboardInterrupt
        return None
    if wrong is not None:  # all is free, so that the likelihood has no maximum there
        raise wrong
    read, total, score = moved
    return Fit(
        "profile likelihood" if statistics.complete else "em",
        [score],
        factors.n_iter,
        converged=not at_floor if statistics.complete else factors.converged,
        interrupted=factors.interrupted,
        last=read,
        total=total,
    )


class _Free(NamedTuple):
    """A map whose mean, loadings and noise are free."""

    reading: DenseMap
    """Where the parameters start."""
    names: dict[str, list[str]] | None
    """Of the parameters of each part; None where the model states them."""
    shape: NDArray[np.float64] | None
    """(T,) the noise up to its one factor; None where each token has a noise of its own."""
    prior: profile.Prior | None
    """Of the noise."""

    @property
    def n_latents(self) -> int:
        return self.reading.loading.shape[-1]


def _free(problem: Problem, statistics: SufficientStatistics) -> _Free | None:
    """Which parameters are free; None where the program does not leave mean, loadings and noise free."""
    leaves, log_prior = problem.leaves(), problem.noise_prior
    if log_prior is None and problem.log_prior is not None:
        return None
    reading = _map(problem.objective.read())
    # float32's digits do not suffice to see whether a target has been reached
    if len(reading.loc) != 1 or not statistics.n_rows or reading.loc.dtype != torch.float64:
        return None
    stated = problem.bound.structure.parts
    if stated is not None:
        names, n_noise = None, leaves[stated.noise].numel()
    else:
        names = _free_parts(reading, leaves)
        if names is None:
            return None
        n_noise = sum(leaves[n].numel() for n in names["noise"])
    n_tokens, n_latents = reading.loading.shape[-2:]
    tied = n_noise == 1
    if (tied and n_latents >= n_tokens) or (not tied and n_noise < n_tokens):
        return None
    shape = reading.noise[0].detach().cpu().numpy() if tied else None
    prior = None if log_prior is None else log_prior.given(statistics.n_rows)
    if prior is not None and shape is not None:
        if np.ptp(shape):  # the prior is of one noise of all columns, not of a factor of several
            return None
        prior = prior._replace(rate=prior.rate * shape[:1])
    return _Free(reading, names, shape, prior)


def _of_complete_rows(
    statistics: SufficientStatistics, free: _Free, max_iter: int, tol: float, at_floor: bool
) -> incomplete.Maximum:
    """The best mean, loadings and noise of complete rows."""
    cov = statistics.covariance
    if free.shape is not None:
        best = profile.proportional(cov, free.n_latents, free.shape, prior=free.prior, at_floor=at_floor)
    else:
        best = profile.diagonal(
            cov, free.n_latents, n_rows=statistics.n, prior=free.prior, max_iter=max_iter, tol=tol
        )
    return incomplete.Maximum(best.lml, statistics.mean.cpu().numpy(), best.loading, best.noise, best.n_iter)


def _free_parts(reading: DenseMap, leaves: dict[str, Tensor]) -> dict[str, list[str]] | None:
    """Names of the parameters of noise, loadings and mean; None where they share some, or have none."""
    touches = _touches(reading, leaves)
    for name in leaves:
        if leaves[name].numel() and not any(name in names for names in touches.values()):
            raise untouched(name)
    of_loc, of_noise = touches["loc"], touches["noise"]
    of_loading = touches["loading"] - of_noise
    if of_loc & (of_noise | touches["loading"]) or not of_loc:
        return None
    if reading.loading.shape[-1] and not of_loading:
        return None
    return {"noise": sorted(of_noise), "loading": sorted(of_loading), "loc": sorted(of_loc)}


def _targets(reading: DenseMap, factors: incomplete.Maximum) -> dict[str, Tensor]:
    """What each part of the map should become: log noise (T,), loadings (T, K), mean (T,)."""

    def as_tensor(a: NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(a)).to(reading.loc)

    loading = np.zeros(reading.loading.shape[-2:])  # beyond T latents, columns of zeros
    loading[:, : factors.loading.shape[1]] = factors.loading
    return {
        "noise": as_tensor(np.log(factors.noise)),
        "loading": as_tensor(loading),
        "loc": as_tensor(factors.mean),
    }


def _units(targets: dict[str, Tensor], moments: SufficientStatistics) -> dict[str, Tensor]:
    """The unit of a miss of each part."""
    sd = moments.variance.sqrt()
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    sd = torch.maximum(sd, (0.5 * targets["noise"]).exp())  # of a constant column, rounding
    return {"noise": torch.ones_like(sd), "loading": sd[:, None], "loc": sd}


def _move_to(
    problem: Problem, free: _Free, factors: incomplete.Maximum, moments: SufficientStatistics, off: float
) -> tuple[Conditionals, float, float] | None:
    """Move the parameters to these factors; None, and back, where they cannot follow.

    What is read there comes with its total log-density and the mean score a row, which has its share of a prior.
    ``off`` is how far, relative, the score may be from that of the factors.
    """
    leaves, targets, before = problem.leaves(), _targets(free.reading, factors), save()
    read = _follow(problem, free, leaves, targets, moments)
    if read is None:
        restore(leaves, before)
        return None
    with torch.no_grad():
        total, prior = problem.objective.total(read), problem.noise_prior
        score = total / problem.whole.n_rows
        moved = abs(float(score) - factors.lml) <= off * (1 + abs(factors.lml))
        if prior is not None:  # which is of the parameter that it names, and the map follows that
            moved = moved and bool(torch.isclose(prior(), prior.of_map(targets["noise"].exp())))
        if not moved:
            restore(leaves, before)
            return None
        return read, float(total), float(problem.with_prior(score))


def _follow(
    problem: Problem,
    free: _Free,
    leaves: dict[str, Tensor],
    targets: dict[str, Tensor],
    moments: SufficientStatistics,
) -> Conditionals | None:
    """The map with its parts at their targets, read; None where the parameters cannot follow."""
    parts = problem.bound.structure.parts
    if parts is not None:
        _set(parts, leaves, targets)
        return problem.objective.read()
    # Where every part is its own parameter, a rotation of it, or one that all tokens share, a step along the transposed
    # Jacobian arrives.
    assert free.names is not None
    before = save()
    _step_along_transpose(free.reading, leaves, targets, free.names)
    read = problem.objective.read()
    units = _units(targets, moments)
    if all(_reached(_map(read), part, target, units[part]) for part, target in targets.items()):
        return read
    restore(leaves, before)
    for part, target in targets.items():
        own = [leaves[n] for n in free.names[part]]
        if target.numel() and not _reach(problem, own, part, target, units[part]):
            return None
    return problem.objective.read()


@torch.no_grad()
def _set(parts: Parts, leaves: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Let the parameters that are the parts of the map be their targets."""
    bounds = pyro.get_param_store().get_state()["constraints"]
    for part, name in parts._asdict().items():
        value = targets[part].exp() if part == "noise" else targets[part]
        if value.numel() != leaves[name].numel():  # one noise of all tokens
            value = value[0]
        leaves[name].copy_(transform_to(bounds[name]).inv(value.reshape(leaves[name].shape)))


def _refuse_floor(noise: NDArray[np.float64], moments: SufficientStatistics) -> None:
    """Refuse noises at their floor under a prior that has no weight at zero: the likelihood has outweighed it."""
    at_floor = np.flatnonzero(noise <= 2 * FLOOR * moments.variance.cpu().numpy())
    if len(at_floor):
        raise profile.NoiseFloorError(list(at_floor))


def _map(read: Conditionals) -> DenseMap:
    """The linear-Gaussian map that was read."""
    found = read.linear_map()
    assert found is not None  # as a program that is `dense` has one
    return found


def _part(reading: DenseMap, part: str) -> Tensor:
    """loc (T,), loading (T, K) or log noise (T,)."""
    out = getattr(reading, part)[0]
    return out.log() if part == "noise" else out


def _reached(reading: DenseMap, part: str, target: Tensor, unit: Tensor) -> bool:
    miss = (target - _part(reading, part)).detach().abs()
    return bool((miss <= 1e-11 * (unit + target.abs())).all())


def _step_along_transpose(
    reading: DenseMap,
    leaves: dict[str, Tensor],
    targets: dict[str, Tensor],
    names: dict[str, list[str]],
) -> None:
    """Each part by itself: the step a J' miss of steepest descent, with the length that is best for a linear part."""
    parts = {part: _part(reading, part) for part in targets}
    parts = {part: out for part, out in parts.items() if out.requires_grad and out.numel()}
    own = [(part, name) for part in parts for name in names[part]]
    if not own:
        return
    outs, moved = list(parts.values()), [leaves[name] for _, name in own]
    miss = [(targets[part] - out).detach() for part, out in parts.items()]
    dummies = [torch.zeros_like(out, requires_grad=True) for out in outs]
    # J' dummy, whose slope in the direction of a step v is J v; parts have leaves of their own
    pulled = torch.autograd.grad(outs, moved, dummies, create_graph=True, materialize_grads=True)
    steps = torch.autograd.grad(outs, moved, miss, retain_graph=True, materialize_grads=True)
    moving = [i for i, p in enumerate(pulled) if p.requires_grad]
    pushed = torch.autograd.grad(
        [pulled[i] for i in moving], dummies, [steps[i] for i in moving], materialize_grads=True
    )
    with torch.no_grad():
        for part, push in zip(parts, pushed, strict=True):
            # |miss - a J J' miss|^2 is least at a = |J' miss|^2 / |J J' miss|^2
            mine = [(name, step) for (of, name), step in zip(own, steps, strict=True) if of == part]
            size = push.square().sum()
            length = sum(step.square().sum() for _, step in mine) / size if size > 0 else 0.0
            for name, step in mine:
                leaves[name] += length * step


def _touches(reading: DenseMap, leaves: dict[str, Tensor]) -> dict[str, set[str]]:
    """Which parameters move which part of the map."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, set[str]] = {"loc": set(), "loading": set(), "noise": set()}
    pull: dict[str, dict[str, float]] = {name: {} for name in leaves}
    for part, out in zip(found, dimensionless(reading), strict=True):
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


def _reach(problem: Problem, leaves: list[Tensor], part: str, target: Tensor, unit: Tensor) -> bool:
    """Move these parameters until a part of the reading equals its target: Gauss-Newton, steps by LSMR."""
    sizes = [leaf.numel() for leaf in leaves]
    for _ in range(20):
        reading = _map(problem.objective.read())
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
