"""Checks of a map against runs of the program on real rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.affine.form import AffineForm, NotAffine, Way
from bayes_mpt.program.affine.maps import DenseMap, Map
from bayes_mpt.program.affine.normals import (
    batch,
    latent_parts,
    latent_values,
    scale_of,
    token_normal,
    tokens_of,
)
from bayes_mpt.program.affine.probes import close, probes_of, tolerance
from bayes_mpt.program.arguments import fill
from bayes_mpt.program.program import Model, ModelError, list_names
from bayes_mpt.program.run import run

__all__ = [
    "Trial",
    "compare_with_program",
    "covariates",
    "refuse_dependence",
    "same_by_label",
    "same_map",
    "shared_map",
    "trial_run",
]


class Trial(NamedTuple):
    """One run on real rows, each with random latents of its own, that all checks compare with."""

    trace: Trace
    z: Tensor
    """(N, K)"""
    loc: Tensor
    """(N, T), as the others."""
    scale: Tensor
    value: Tensor
    prior: Tensor
    """Means and roots of the latents given the earlier ones."""


def trial_run(model: Model, args: tuple[Any, ...], structure: AffineForm, z: Tensor | None = None) -> Trial:
    """The program on these rows at latents z; by default one standard deviation away, no two rows alike."""
    if z is None:
        n_rows = batch(structure, args)
        factor = 0.5 + torch.arange(n_rows, dtype=args[0].dtype, device=args[0].device)[:, None] / n_rows
        z = factor * probes_of(structure, args[0])[structure.n_latents + 1]
    with torch.no_grad():
        trace = run(model, args, latent_values(structure, z))
        loc, scale = (t[0] for t in token_normal(trace, structure))
        latent_loc, roots = latent_parts(trace, structure)
        prior = torch.cat([latent_loc[0], *[r[0].flatten(1) for r in roots]], 1)
        return Trial(trace, z, loc, scale, tokens_of(trace, structure), prior)


def covariates(args: tuple[Any, ...]) -> bool:
    """Whether rows come with more than their tokens."""
    n_rows = len(args[0])
    with_rows = [a for a in args if isinstance(a, Tensor) and a.ndim and len(a) == n_rows]
    return len(with_rows) > 1


def shared_map(model: Model, args: tuple[Any, ...], structure: AffineForm, before: Trial, way: Way) -> Any:
    """The map read from probe rows, if the real rows have the same one; else None."""
    try:
        reading = way.read_shared(model, args, structure)
    except (RuntimeError, ValueError, IndexError):
        return None  # the program does not take K + 4 rows, or they differ
    return reading if same_map(reading, before) else None


def same_by_label(
    model: Model, args: tuple[Any, ...], structure: AffineForm, reading: DenseMap, label: Tensor
) -> bool:
    """Whether each of these rows has the map that its label (N,) numbers among the B of the reading."""
    filled = tuple(fill(a) for a in args)
    loc, loading, noise, latent_loc, root = (t[label] for t in reading[:5])
    of_rows = DenseMap(loc, loading, noise, latent_loc, root, reading.scale, reading.value)
    return same_map(of_rows, trial_run(model, filled, structure))


def same_map(reading: Map, before: Trial) -> bool:
    """Whether these rows have this one map."""
    with torch.no_grad():
        mean, variance, size = reading.tokens_at(before.z)
        same = (before.loc - mean).abs() <= tolerance(before.loc) * size
        return bool(same.all()) and close(before.scale.square(), variance)


def refuse_dependence(model: Model, args: tuple[Any, ...], structure: AffineForm, before: Trial) -> None:
    """The map may not look at the tokens, nor one row at other rows: change x and see what moves."""
    if structure.sub_rows is not None:
        return  # other rows every run; the estimator refuses such programs, SVI scales them
    with torch.no_grad():
        for position, arg in enumerate(args):
            if not isinstance(arg, Tensor) or not arg.ndim or not arg.numel():
                continue
            for changed_arg in _changes(arg):
                after = _after(
                    model, (*args[:position], changed_arg, *args[position + 1 :]), structure, before.z
                )
                if after is None:
                    continue  # the program does not take such values: log(x) of negative ones, say
                moves = [not close(a, b) for a, b in zip(after[2:], before[2:], strict=True)]
                if moves[2] and (moves[0] or moves[1] or moves[3]):
                    what = "mean" if moves[0] else "scale" if moves[1] else "prior"
                    where = f"observed site {structure.observed!r}"
                    if not (moves[0] or moves[1]):
                        where = f"latent site {list_names(map(repr, structure.latent_names))}"
                    raise ModelError(
                        f"the {what} of {where} changes with "
                        "the observed x itself (a statistic of x inside the program, or x as its own covariate): a "
                        "hidden token would be scored with its own value. Compute the statistic outside, make it a "
                        "pyro.param, or pass covariates as a further argument"
                    )
                if not structure.by_row or len(arg) != len(before.value) or len(arg) < 2:
                    break
                keep = len(arg) // 2
                late = torch.cat([arg[:keep], changed_arg[keep:]])
                after = _after(model, (*args[:position], late, *args[position + 1 :]), structure, before.z)
                if after is None:
                    continue
                for what, a, b in zip(
                    ("mean", "scale", "value", "latents' prior"), after[2:], before[2:], strict=True
                ):
                    if not close(a[:keep], b[:keep]):
                        raise ModelError(
                            f"the {what} of observed site {structure.observed!r} in one row depends on other rows of "
                            f"plate {structure.rows_plate!r} (a statistic of x inside the program), so rows are not "
                            "independent: compute it outside the program, or make it a pyro.param"
                        )
                break  # one kind of change that the program takes is enough


def _changes(arg: Tensor) -> list[Tensor]:
    """Other values for an argument: shifted with changed signs; and, for programs that need positive ones, scaled."""
    generator = torch.Generator().manual_seed(1)
    if not arg.is_floating_point():  # codes and whole numbers: resampled
        index = torch.randint(len(arg), arg.shape, generator=generator)
        return [torch.gather(arg, 0, index.to(arg.device))]
    random = torch.rand(arg.shape, generator=generator, dtype=torch.float64).to(arg)
    size = arg.abs().mean(0) + arg.std(0, correction=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return [(4 * random - 2) * size - arg, arg * (1 + 0.5 * random)]


def _after(model: Model, args: tuple[Any, ...], structure: AffineForm, z: Tensor) -> Trial | None:
    try:
        after = trial_run(model, args, structure, z)
    except (RuntimeError, ValueError, IndexError):
        return None
    return after if all(bool(torch.isfinite(t).all()) for t in after[2:]) else None


def compare_with_program(structure: AffineForm, reading: Map, before: Trial) -> None:
    """The map must give the very log-density that the program gives itself."""
    trace, z = before.trace, before.z
    with torch.no_grad():
        trace.compute_log_prob()
        want = sum(float(s["log_prob_sum"]) for s in trace.nodes.values() if s["type"] == "sample")
        mean, variance, size = reading.tokens_at(z)
        got = scale_of(trace.nodes[structure.sites[0]]) * float(
            reading.log_joint(z, before.value, mean, variance)
        )
        # A mean that is large beside its noise is rounded: d log N(x; m, v) = (x - m) / v dm,  dm = eps (|x| + |m|)
        rounded = torch.finfo(z.dtype).eps * (before.value.abs() + size)
        rounding = 8 * float(((before.value - mean).abs() / variance * rounded).sum())
    if structure.sub_rows is None and not abs(got - want) <= tolerance(z) * 1e3 * (1 + abs(want)) + rounding:
        raise NotAffine(
            f"read as a linear-Gaussian program its log-density is {got:.8g}, but the program's own is {want:.8g} "
            f"(observed site {structure.observed!r}): it contains a mask, a scale on one site or a factor"
        )
