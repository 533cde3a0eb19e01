"""Draws as a sampler leaves them: read from a dict or an object of ArviZ, refused by name, in unconstrained space.

Programs, guides and arguments that cannot be called are refused here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from bayes_mpt.inputs import unmasked
from bayes_mpt.program.latents import Space
from bayes_mpt.program.program import Model, ModelError
from bayes_mpt.program.run import one_precision, signature_of, takes_visible
from bayes_mpt.program.store import own_random_state

__all__ = [
    "MIN_DRAWS",
    "read_arguments",
    "read_chains",
    "read_tables",
    "refuse_call",
    "refuse_other_joint",
    "unconstrained",
]

Array = NDArray[np.float64]

MIN_DRAWS = 200  # in all
N_COMPARED = 64  # draws at which the recorded log joint is compared
SAME = (1e-3, 2e-6)  # nats, and share of the log joint: what single precision leaves of it
CLOSE = 1e-4  # of a draw that is taken to unconstrained numbers and back


def read_arguments(data: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays as tensors, numbers in double precision; the rest as it is."""

    def read(a: Any) -> Any:
        a = unmasked(a)
        a = a.to_numpy() if hasattr(a, "to_numpy") else a
        a = torch.as_tensor(np.asarray(a)) if isinstance(a, np.ndarray | list) else a
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(read(a) for a in data)


def refuse_call(program: Any, data: tuple[Any, ...], name: str) -> None:
    """Refuse what is no program or guide, called ``name``, and one that these arguments do not suit.

    Raises
    ------
    TypeError
        If it cannot be called.
    ModelError
        If it wants other arguments.

    Examples
    --------
    >>> refuse_call(lambda x, y: None, (1.0,), "model")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ModelError: model <lambda>(x, y) was given 1 argument after the draws or the guide, which it does not take
    """
    if not callable(program) or isinstance(program, type):
        got = f"the class {program.__name__}" if isinstance(program, type) else type(program).__name__
        raise TypeError(
            f"{name} must be a Pyro {'guide' if name == 'guide' else 'program'}, a function or module that calls "
            f"pyro.sample, got {got}"
        )
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        signature = signature_of(target)
    except (TypeError, ValueError):
        return  # it does not say what it takes
    try:
        signature.bind(*data, **({"visible": None} if takes_visible(program) else {}))
    except TypeError as error:
        said = getattr(program, "__name__", type(program).__name__)
        n = len(data)
        raise ModelError(
            f"{name} {said}{signature} was given {n} argument{'s' * (n != 1)} after the draws or the guide, which it "
            f"does not take ({error}): pass all that it is called with, in its order; what may be left out needs a "
            "default there"
        ) from None


def read_tables(draws: Any, log_joint: Any) -> tuple[dict[str, NDArray[Any]], Array | None]:
    """Draws by site as they were given, and the log joint that was recorded beside them."""
    table = draws
    if hasattr(draws, "posterior"):  # of ArviZ
        table = {n: v.transpose("chain", "draw", ...).values for n, v in draws.posterior.data_vars.items()}
        recorded = getattr(getattr(draws, "sample_stats", None), "data_vars", {})
        if log_joint is None and "lp" in recorded:
            log_joint = recorded["lp"].transpose("chain", "draw").values
    groups = (
        [str(n) for n, v in table.items() if hasattr(v, "data_vars")] if isinstance(table, Mapping) else []
    )
    if groups:
        raise TypeError(f"draws of ArviZ must have a group 'posterior', and these have only {groups}")
    if not isinstance(table, Mapping):
        raise TypeError(
            "draws must be a mapping from site names to arrays (chains, draws, ...), such as "
            f"mcmc.get_samples(group_by_chain=True), or an object of ArviZ with a posterior, got {type(draws).__name__}"
        )

    def plain(value: Any) -> NDArray[Any]:
        return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)

    arrays = {str(name): plain(value) for name, value in table.items()}
    return arrays, None if log_joint is None or log_joint is False else plain(log_joint).astype(float)


def read_chains(
    arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """Draws (C, S, ...) of sites whose values have these shapes; refuse what is none of them."""
    out: dict[str, Array] = {}
    for name, shape in shapes.items():
        if name not in arrays:
            raise ModelError(
                f"there are no draws of latent site {name!r}, only of {sorted(arrays)}: add them"
            )
        value = arrays[name]
        if value.ndim == len(shape) + 1:
            value = value[None]
        if value.shape[2:] != shape or value.ndim < 2:
            raise ModelError(
                f"draws of latent site {name!r} must have shape {_words('chains', 'draws', *shape)}, or "
                f"{_words('draws', *shape)} of one chain, as the site has {shape} in the program; got "
                f"{arrays[name].shape}"
            )
        bad = np.argwhere(~np.isfinite(value))
        if len(bad):
            raise ModelError(
                f"draw {int(bad[0, 1])} of chain {int(bad[0, 0])} of latent site {name!r} is not a finite number: "
                "remove the chain, or those draws from all sites"
            )
        out[name] = value.astype(float)
    sizes = {name: value.shape[:2] for name, value in out.items()}
    if len(set(sizes.values())) > 1:
        raise ModelError(f"all sites must have as many chains and draws, got (chains, draws) of {sizes}")
    for n_chains, n in sizes.values():
        if n_chains > n:
            raise ModelError(
                f"draws must have their chains first, got {n_chains} chains of {n} draws: swap the first two axes"
            )
        if n_chains * n < MIN_DRAWS:
            raise ModelError(f"at least {MIN_DRAWS} draws are needed for an error, got {n_chains * n}")
    return out


def unconstrained(space: Space, values: Mapping[str, Array]) -> Array:
    """Draws (C, S, ...) as real vectors (C, S, d); refuse what is outside of the support."""
    n_chains, n = next(iter(values.values())).shape[:2]
    flat = {name: torch.as_tensor(v.reshape(n_chains * n, *v.shape[2:])) for name, v in values.items()}
    with torch.no_grad():
        u = space.pack_values(flat, n_chains * n, 1)  # (M, 1, d)
        back = space._replace(depth=0).values(u)[0]
    for part in space.parts:
        name, given = part.latent.name, flat[part.latent.name]
        off = ((back[name] - given).abs() > CLOSE * (1 + given.abs())) | ~torch.isfinite(back[name])
        bad = off.reshape(n_chains * n, -1).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise ModelError(
                f"draw {bad[0] % n} of chain {bad[0] // n} of latent site {name!r} is outside of the site's support or "
                f"on its edge: {given[bad[0]].tolist()}. Draws are wanted in constrained space, as get_samples() gives "
                "them, of this program"
            )
    return u[:, 0].reshape(n_chains, n, -1).numpy()


def refuse_other_joint(
    model: Model, args: tuple[Any, ...], arrays: Mapping[str, NDArray[Any]], recorded: Array
) -> None:
    """Refuse draws whose recorded log joint is, but for a constant, not that of this program and these data.

    Compared are log p(z, x) and log p(u, x), z constrained and u not, by the function that Pyro's samplers call.
    """
    with own_random_state(0), one_precision(args):
        try:
            _, potential, transforms, trace = initialize_model(model, args)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"Pyro's samplers do not run this program on these data ({str(error).splitlines()[0]}), so that the "
                "recorded log joint cannot be compared: log_joint=False leaves it out"
            ) from error
        missing = sorted(set(transforms) - set(arrays))
        if missing:
            raise ModelError(
                f"the recorded log joint is that of all latents, and there are no draws of {missing}: add them, or "
                "log_joint=False leaves the comparison out"
            )
        values = read_chains(arrays, {name: tuple(trace.nodes[name]["value"].shape) for name in transforms})
        size = next(iter(values.values())).shape[:2]
        if recorded.shape != size and (1, *recorded.shape) != size:
            raise ModelError(f"log_joint must have shape {size}, as the draws have, got {recorded.shape}")
        lp = recorded.ravel()
        picked = np.linspace(0, len(lp) - 1, min(len(lp), N_COMPARED)).round().astype(int)
        found = []
        for i in picked:
            at = {n: torch.as_tensor(v.reshape(-1, *v.shape[2:])[i]) for n, v in values.items()}
            u = {n: transforms[n](v) for n, v in at.items()}
            with torch.no_grad():
                jacobian = sum(float(transforms[n].log_abs_det_jacobian(at[n], u[n]).sum()) for n in at)
                with_jacobian = -float(potential(u))  # log p(z, x) - log |du / dz|
            found.append((with_jacobian, with_jacobian + jacobian))
    ours = np.array(found).T  # (2, n)
    limit = SAME[0] + SAME[1] * np.abs(ours).max()
    spread = min(float(np.ptp(way - sign * lp[picked])) for way in ours for sign in (1, -1))
    if not spread <= 2 * limit:
        raise ModelError(
            "the recorded log joint is not that of this program on these data: their difference should be the same at "
            f"every draw, and varies by {spread:.3g} nats. Were the draws made of other data, or under another prior? "
            "If another library recorded it, with transforms of its own, log_joint=False leaves it out"
        )


def _words(*axes: Any) -> str:
    return f"({', '.join(map(str, axes))}{',' * (len(axes) == 1)})"
