"""Runs of a program at other latents, other parameters and other rows: what is observed must be data, and hide nothing.

Three runs show it. One at other latents and parameters, with some cells missing: the observed values must stay. One
with all rows changed: where the tokens move, no distribution may, unless tokens have an order in which each looks at
earlier ones (`token_graph`). One with half of the rows changed, and one row fewer: nothing may move in the others. The
parameters of these runs are a little off their start, since a parameter that is zero or one there hides what it
multiplies.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from bayes_mpt.program.arguments import changes, rows_of, same_cells
from bayes_mpt.program.layout import laws_of
from bayes_mpt.program.missing import gaps_show, holes_in, same_but_for
from bayes_mpt.program.other_latents import run_on_others
from bayes_mpt.program.program import (
    ModelError,
    Order,
    ValuesMove,
    list_names,
    one_vector,
)
from bayes_mpt.program.run import FAILURES, FirstRun, run, values_of
from bayes_mpt.program.sites import (
    base,
    is_subsample,
    latent_nodes,
    node_of,
    observed_nodes,
    own_shown,
    sub_samples,
)
from bayes_mpt.program.store import moved_parameters
from bayes_mpt.program.token_graph import find_order

__all__ = ["CLOSE", "Verdict", "raise_moving", "refuse_hidden", "try_others"]

N_OTHERS = 3  # draws of all latents that are tried to see whether observed values move
MOVED = 0.05  # of the parameters
SURE = 1e-5  # probability of other values up to which a prior leaves a latent no choice
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


Laws = dict[str, tuple[Tensor, ...]]
"""Distributions by site, as `laws_of` gives them."""


class Verdict(NamedTuple):
    """What the runs of a program that keeps to the rules have shown besides."""

    other: Trace | None
    """The run at other latents, those of all rows alike if that was asked for; None if the program breaks there."""
    gaps: bool
    """Missing cells of the argument that is observed are missing tokens, and hide no others."""
    by_number: bool
    """A distribution depends on how many rows there are."""
    order: Order | None = None
    """Of the tokens, where they look at each other."""
    coupled: bool = False
    """Tokens look at those of other rows, so that the order is that of one vector."""


def _refuse_masked_latents(run_once: FirstRun) -> None:
    """A latent may be masked only where nothing that is visible depends on it, as behind the end of a series."""
    model, args, first = run_once.model, run_once.args, run_once.trace
    masked = {n["name"]: own_shown(n) | _certain(n) for n in latent_nodes(first)}
    masked = {name: shown for name, shown in masked.items() if not bool(shown.all())}
    if not masked:
        return
    held = run_once.latents
    other = run_on_others(model, args, first, {n: v for n, v in held.items() if n not in masked})
    for name, shown in masked.items():
        held[name] = torch.where(shown, held[name], node_of(other, name)["value"])
    with torch.no_grad(), pyro.validation_enabled(False):
        moved = run(model, args, {**held, **sub_samples(first)})
        before, after = _visible_log_probs(first), _visible_log_probs(moved)
    if all(same_cells(before[name], after[name]) for name in before):
        return
    name = next(iter(masked))
    raise ModelError(
        f"latent site {name!r} is masked (poutine.mask), so that its prior is not counted although visible values "
        "depend on it: such a program has no marginal likelihood. Take the mask off the latent, and give it a wide "
        "prior if it is to be free; a discrete latent may be masked where its prior leaves it one value"
    )


def _certain(node: Any) -> Tensor:
    """Where a discrete latent's prior leaves it no choice, so that it may as well be counted."""
    fn, value = node["fn"], node["value"]
    none = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    if not getattr(fn, "has_enumerate_support", False) or fn.event_dim or len(fn.batch_shape) != value.ndim:
        return none
    with torch.no_grad(), suppress(NotImplementedError):
        found = base(fn).log_prob(fn.enumerate_support(expand=False))
        return found.exp().amax(0).expand(value.shape) > 1 - SURE
    return none


def _visible_log_probs(trace: Trace) -> dict[str, Tensor]:
    """Log-densities of all sites, 0 where masks of the program hide them."""
    trace.compute_log_prob()
    return {
        name: node["log_prob"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not is_subsample(node)
    }


def refuse_hidden(first: FirstRun) -> None:
    """Masks of the program must leave something to score, and no latent out on which something visible depends."""
    nodes = observed_nodes(first.trace)
    if not any(bool(own_shown(node).any()) for node in nodes):
        raise ModelError(
            f"a mask of the program hides every value of {list_names(repr(n['name']) for n in nodes)}: nothing is left "
            "to score. Take the mask away; missing cells are left NaN in x, and left out by the package"
        )
    _refuse_masked_latents(first)


def try_others(
    first: FirstRun,
    *,
    position: int | None = None,
    alike: bool = False,
    real: bool = False,
    values_only: bool = False,
) -> Verdict:
    """Run a program at other latents and on other rows, and refuse it by name if it does what no program may.

    Parameters
    ----------
    first : FirstRun
        The program.
    position : int, optional
        The argument that the tokens are, as far as the first run shows.
    alike : bool, default=False
        Latents of all rows alike in the run at other latents: then what differs between rows are their maps.
    real : bool, default=False
        All tokens are real numbers, so that also whole ones may be changed into others.
    values_only : bool, default=False
        Distributions may look at the rows.

    Raises
    ------
    ModelError
        If observed values move by chance; if a distribution looks at the tokens and these have no order, or one row
        at others. The site is named.
    ValuesMove
        If observed values move with latents or parameters.
    """
    trials = _Trials(first, _Like(position, alike, real))
    for size in (0.0,) if values_only else (MOVED, 0.0):
        with moved_parameters(size):
            if not trials.meet_others():
                continue
            trials.refuse_moving_values(moved=size > 0)
            if not values_only:
                trials.refuse_dependence()
            return trials.verdict
    if not values_only:  # where it is trained it says why it breaks
        trials.refuse_dependence()
    return trials.verdict


def raise_moving(name: str, latents: tuple[str, ...] | None) -> NoReturn:
    """The error of observed values that change with latents or parameters, or without any (None) from run to run.

    Where these shift the values, they are scored all the same (`bayes_mpt.program.shift_trials`).
    """
    if latents is None:
        raise ModelError(
            f"observed values of site {name!r} change from run to run: what is observed must be data. Draw random "
            "numbers outside the program, or by pyro.sample"
        )
    what = f"the latents {list_names(map(repr, latents))}" if latents else "parameters"
    raise ValuesMove(
        f"observed values of site {name!r} change with {what}: what is observed must be data. Put these into the "
        f"distribution: of a residual, pyro.sample({name!r}, dist.Normal(0, 1), obs=x - mu), write "
        f"pyro.sample({name!r}, dist.Normal(mu, 1), obs=x)"
    )


class _Like(NamedTuple):
    """Arguments of `try_others`."""

    position: int | None
    alike: bool
    real: bool


class _Looks(NamedTuple):
    """What of a program looks at tokens."""

    laws: bool
    masks: bool


class _Trials:
    """The runs of `try_others`, and what they are compared with."""

    def __init__(self, run_once: FirstRun, like: _Like):
        self.run_once = run_once
        self.model, self.args, program, first = run_once
        self.program, self.first = program, first
        self.position, self.alike, self.real = like
        self.axes = {s.name: s.row_axis for s in program.sites} | {
            s.name: s.row_axis for s in program.latents
        }
        self.other: Trace | None = None
        self.laws: Laws = {}
        self.holed = self.gaps = self.by_number = self.coupled = False
        self.order: Order | None = None
        self.values = {name: first.nodes[name]["value"] for name in program.site_names}
        """Observed values at the parameters of these runs."""

    @property
    def verdict(self) -> Verdict:
        """What was found."""
        return Verdict(self.other, self.gaps, self.by_number, self.order, self.coupled)

    # ------------------------------------------------------------------------------------------------ other latents

    def meet_others(self) -> bool:
        """Run the program at other latents, with missing cells if it takes them; whether it could."""
        self.gaps = self.holed = False
        if self.position is not None:
            rows, holes = holes_in(self.args, self.position)
            try:
                other = self._at_others(rows, 1)
            except FAILURES:
                self.gaps = True  # a program that does not take missing cells has no view of its own of them
            else:
                if self._is_sound(other):
                    self.holed = True
                    self.gaps = gaps_show(self.first, other, holes, self.program)
                    return True
        self.holed = False
        for seed in range(1, 1 + N_OTHERS):
            try:
                other = self._at_others(self.args, seed)
            except FAILURES:
                continue  # far out in a prior a program may break
            if self._is_sound(other):
                return True
        self.other = None
        return False

    def refuse_moving_values(self, moved: bool) -> None:
        """No observed value may change with latents, with parameters, or from run to run."""
        assert self.other is not None
        held = self.run_once.latents
        for name, value in self.values.items():
            if value.requires_grad:
                raise_moving(name, tuple(held))
        if self.holed:
            holes = holes_in(self.args, self.position)[1]
            if same_but_for(holes, self.first, self.other, self.program):
                return
            self.position = None
            if not self.meet_others():
                return
        for name, value in self.values.items():
            if same_cells(value, node_of(self.other, name)["value"]):
                continue
            there, again = (node_of(self._at_others(self.args, s, held), name)["value"] for s in (2, 3))
            if not same_cells(there, again) or not (same_cells(there, value) or moved):
                raise_moving(name, None)
            if not same_cells(there, value):
                raise ModelError(
                    f"observed values of site {name!r} are computed with parameters that are cut off from gradients "
                    "(.detach(), .data, .item()), so that their density would not be that of the data: observe the "
                    "data, obs=x, and put the parameters into the distribution"
                )
            raise_moving(name, tuple(held))

    def _at_others(self, rows: tuple[Any, ...], seed: int, held: dict[str, Tensor] | None = None) -> Trace:
        axes = {s.name: s.row_axis for s in self.program.latents} if self.alike else {}
        return run_on_others(self.model, rows, self.first, held or {}, seed, axes)

    # --------------------------------------------------------------------------------------------------- other rows

    def refuse_dependence(self) -> None:
        """No distribution may look at the tokens, and no row at others: change the rows and see what moves.

        Latents stay as they are in the run at other latents. Tokens that look at each other must have an order.
        """
        base = self.first if self.other is None else self.other
        latents = values_of(base)
        before = self._laws(base) if self.other is None else self.laws
        if self.holed and self.program.shifts:  # what shifts a missing cell is not seen
            whole = self._taken(self.args, latents)
            before = before if whole is None else whole[1]
        n_rows, looks = len(self.args[0]), _Looks(False, False)
        for position, arg in enumerate(self.args):
            if not isinstance(arg, Tensor) or not arg.ndim or not arg.numel():
                continue
            for changed in changes(arg, self.real):
                ran = self._taken(self.run_once.with_argument(position, changed), latents)
                if ran is None:
                    continue  # the program does not take such values: log(x) of negative ones, say
                here = _Looks(False, False)
                if self._moves(ran[0]) and any(self._looks(*ran, before)):
                    if self.holed:  # a statistic that is NaN may pass for a number
                        whole = self._taken(self.args, latents)
                        if (
                            whole is not None
                        ):  # what is another law where cells are NaN is looked at when rows are read
                            self.gaps = self.gaps and not self._looks(*whole, before).laws
                        before = before if whole is None else whole[1]
                    here = self._looks_at_tokens(position, changed, latents, before)
                if self.program.by_row and len(arg) == n_rows > 1:
                    self._refuse_other_rows(position, changed, latents, before, ordered=any(here))
                looks = _Looks(*(a or b for a, b in zip(looks, here, strict=True)))
                break  # one kind of change that the program takes is enough
        if any(looks):
            self._find_order(latents, of_masks=not looks.laws)

    def _find_order(self, latents: dict[str, Tensor], of_masks: bool) -> None:
        """The order of tokens that look at each other, or of which masks alone look at others."""
        draws = [_draw(self.run_once, seed) for seed in range(1, 1 + N_OTHERS)] if latents else [latents]
        program = one_vector(self.program) if self.coupled else self.program
        found = [d for d in draws if d is not None]
        try:
            self.order = find_order(self.run_once._replace(program=program), found or [latents])
        except ModelError:
            if not of_masks:  # refused as a selection of cells (`bayes_mpt.program.mask_trials`)
                raise

    def _looks(self, trace: Trace, laws: Laws, before: Laws) -> _Looks:
        """Whether distributions, and masks of the program, are others than they were."""
        masks = all(
            torch.equal(own_shown(node_of(trace, n)), own_shown(self.first.nodes[n])) for n in self.values
        )
        return _Looks(not all(_close(laws[name], law) for name, law in before.items()), not masks)

    def _looks_at_tokens(
        self, position: int, changed: Tensor, latents: dict[str, Tensor], before: Laws
    ) -> _Looks:
        """Whether distributions move with those columns that tokens are made of: others are covariates."""
        arg = self.args[position]
        only = arg
        for column in range(arg[0].numel()):
            one = arg.reshape(len(arg), -1).clone()
            one[:, column] = changed.reshape(one.shape)[:, column]
            ran = self._taken(self.run_once.with_argument(position, one.reshape(arg.shape)), latents)
            if ran is not None and self._moves(ran[0]):
                only = torch.where(one.reshape(arg.shape) != arg, changed, only)
        ran = self._taken(self.run_once.with_argument(position, only), latents)
        return _Looks(False, False) if ran is None else self._looks(*ran, before)

    def _moves(self, trace: Trace) -> bool:
        """Whether observed values are others than they were."""
        return not all(
            same_cells(value, node_of(trace, name)["value"]) for name, value in self.values.items()
        )

    def _refuse_other_rows(
        self, position: int, changed: Tensor, latents: dict[str, Tensor], before: Laws, *, ordered: bool
    ) -> None:
        """Change every second row and the last: the others must stay as they are, also if there is one row fewer.

        Where tokens look at each other (``ordered``) their distributions may move: their order is that of one vector.
        """
        n_rows, arg = len(changed), self.args[position]
        keep = (
            torch.arange(1, n_rows - 1, 2, device=arg.device)
            if n_rows > 2
            else torch.zeros(1).long().to(arg.device)
        )
        others = self.run_once.with_argument(position, changed.index_copy(0, keep, arg[keep]))
        fewer = {name: self._rows(name, value, n_rows - 1) for name, value in latents.items()}
        ran = self._taken(rows_of(others, slice(n_rows - 1)), fewer, n_rows - 1)
        if ran is not None and self._moved(*ran, before, keep) is None:
            return
        self.by_number = ran is not None
        ran = self._taken(others, latents)
        moved = None if ran is None else self._moved(*ran, before, keep)
        if moved is not None and ordered and not moved.startswith("value"):
            self.coupled = True
        elif moved is not None:
            raise ModelError(
                f"the {moved} in one row depends on other rows of plate {self.program.rows_plate!r} (a statistic of x "
                "inside the program), so rows are not independent: compute it outside the program, or make it a "
                "pyro.param"
            )

    def _moved(self, trace: Trace, laws: Laws, before: Laws, keep: Tensor) -> str | None:
        """What of these rows is not as it was, in words."""
        for name, value in self.values.items():
            if not same_cells(*(self._kept(name, v, keep) for v in (value, node_of(trace, name)["value"]))):
                return f"value of observed site {name!r}"
        for name in before:
            new, old = (tuple(self._kept(name, t, keep) for t in law[name]) for law in (laws, before))
            if not _close(new, old):
                return f"distribution of site {name!r}"
        return None

    def _rows(self, name: str, value: Tensor, n_rows: int | None) -> Tensor:
        """The first rows of what stands for a site."""
        axis = self.axes[name]
        return value if n_rows is None or axis is None else value.narrow(axis, 0, n_rows)

    def _kept(self, name: str, value: Tensor, keep: Tensor) -> Tensor:
        """Some rows of what stands for a site."""
        axis = self.axes[name]
        return value if axis is None else value.index_select(axis, keep)

    def _taken(
        self, rows: tuple[Any, ...], latents: dict[str, Tensor], n_rows: int | None = None
    ) -> tuple[Trace, Laws] | None:
        """A run on other rows, and its laws; None if the program does not take them, or has no densities there."""
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                drawn = sub_samples(self.first) if n_rows is None else {}
                trace = run(self.model, rows, {**latents, **drawn})
            laws = self._laws(trace, n_rows)
        except FAILURES:
            return None
        return None if _is_nan(laws) else (trace, laws)

    @torch.no_grad()
    def _laws(self, trace: Trace, n_rows: int | None = None) -> Laws:
        """The distributions of a run, by the first run's tokens and latents, or their first rows."""
        values = {name: self._rows(name, self.first.nodes[name]["value"], n_rows) for name in self.axes}
        return laws_of(trace, values, self.program)

    def _is_sound(self, trace: Trace) -> bool:
        """Take this run as that at other latents if no density of it is NaN."""
        self.other = trace
        for name in self.axes:
            node_of(trace, name)
        with suppress(*FAILURES):
            self.laws = self._laws(trace)
            return not _is_nan(self.laws)
        return False


def _draw(first: FirstRun, seed: int) -> dict[str, Tensor] | None:
    """Other latents; None where the program breaks there."""
    with suppress(*FAILURES):
        return values_of(run_on_others(first.model, first.args, first.trace, {}, seed))
    return None


def _is_nan(laws: Laws) -> bool:
    return any(bool(t.sum().isnan()) and bool(t.isnan().any()) for law in laws.values() for t in law)


def _close(law: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> bool:
    """Whether two distributions are the same, up to rounding."""
    if all(torch.equal(a, b) for a, b in zip(law, before, strict=True)):
        return True
    unit = before[-1].abs() if len(before) > 1 else 1  # of a mean, the scale
    for a, b in zip(law, before, strict=True):
        if a.shape != b.shape:
            return False
        near = (a - b).abs() <= CLOSE.get(b.dtype, 1e-4) * (unit + b.abs())
        if not bool((near | (a == b) | (a.isnan() & b.isnan())).all()):
            return False
    return True
