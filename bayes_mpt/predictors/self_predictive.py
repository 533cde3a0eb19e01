"""Programs that predict their own hidden tokens: networks trained on masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bayes_mpt.masks import Masks, PermutationChain, Policy, UniformSize, one_each, torch_generator
from bayes_mpt.predictors.base import (
    Bound,
    Conditionals,
    Evidence,
    Guide,
    Leaves,
    Posterior,
    Predictor,
    along_orders,
)
from bayes_mpt.predictors.objective import N_TRIAL_OUTPUTS, Batch, Objective, Outputs
from bayes_mpt.program.analysis import analyze
from bayes_mpt.program.arguments import fill, spread_rows
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.devices import at_once
from bayes_mpt.program.layout import from_rows, rows_first, token_values
from bayes_mpt.program.offers import name_of
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import one_precision, takes_visible
from bayes_mpt.program.sites import base, factor_nodes, node_of

__all__ = ["OWN_MASKS", "SelfConditionals", "SelfPredictive", "on_own_masks", "sees_all"]

OWN_MASKS = UniformSize(64)  # one of them for each row of a step
RUN_CELLS = 2**18  # rows x tokens of one run of the program
CLOSE = (
    2**26
)  # roundings of log-densities, where sums are taken in another order; the root of these in single precision
N_TRIAL = 4  # rows on which it is found out what a program looks at
SHAKE = 0.5  # added to parameters meanwhile: at the start many a network gives the same whatever it sees


class SelfPredictive(Predictor):
    """What the program itself says of its hidden tokens, when it is conditioned on the mask.

    For programs ``model(x, visible)`` without latents: ``x`` (N, T) has zeros where a token is hidden or missing,
    ``visible`` (N, T) bool tells which cells are shown, each row by its own mask, and ``pyro.sample("x", ..., obs=x)``
    inside a rows plate gives each token a distribution. That of a hidden token is log p(x_i | x_visible); what stands
    for visible tokens is not used. A distribution with an attribute ``takes_missing`` is asked for the densities of
    tokens that are NaN where missing; others get a value in their place, and what they say of it is not used.

    A penalty is a factor, ``pyro.factor("name", ...)`` with a number for each row, inside the plate, in nats a hidden
    token: it is added to each hidden token's log-density where gradients are tracked, and so trains the program and
    enters no score.

    Such conditionals need not fit together to one joint density: the sum along a chain,

        log p_o(x) = sum_t log p(x_o(t) | x_o(<t)),

    is a normalised log-density of a row for every order o, and differs between orders. The score is its mean over
    random orders, which is the area under the masked curve. It is at most log mean_o p_o(x), the log-density of the
    mixture over orders, by Jensen's inequality; and so in expectation at most minus the entropy of what made the rows.
    `evidence` tells how far the orders disagree.

    Parameters
    ----------
    n_orders : int, default=4
        Random orders that the score is averaged over. Each takes as many runs of the program as there are tokens; for
        long rows ``estimate(X, masks=UniformSize(...))`` takes as many as it has masks.
    random_state : int, default=0
        For the orders; the same for all rows and all calls.

    Examples
    --------
    A network of one layer, which predicts each token from the mean of the visible ones:

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x, visible):
    ...     slope = pyro.param("slope", torch.tensor(0.0))
    ...     mean = x.sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("x", dist.Normal(slope * mean, 1.0).expand(x.shape).to_event(1), obs=x)
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    >>> pyro.clear_param_store()
    >>> found = SelfPredictive().bind(model, (x,)).read((x,))
    >>> found.conditionals(torch.tensor([[True, False]]))[0, 1].detach()  # log N(2; 0, 1)
    tensor([ 0.0000, -2.9189], dtype=torch.float64)
    """

    def __init__(self, n_orders: int = 4, random_state: int = 0):
        self.n_orders = n_orders
        self.random_state = random_state

    def bind(self, model: Model, args: tuple[Any, ...], guide: Guide | None = None) -> Bound:
        if not takes_visible(model):
            raise ModelError(
                "SelfPredictive needs a program that is conditioned on the mask: model(x, visible), with visible "
                f"(N, T) bool; {name_of(model)} has no argument of that name"
            )
        if len(args) != 1:
            raise ModelError(f"a program model(x, visible) takes one table, got {len(args)} arguments")
        program = analyze(sees_all(model), args, own_masks=True)._replace(takes_visible=True)
        if program.latents:
            raise ModelError(
                f"a program with an argument `visible` predicts hidden tokens itself, but this one has latent sites "
                f"{list(program.latent_names)}: leave the argument out, and the latents are integrated"
            )
        (x,) = args
        if not program.by_row or any(s.n_joint for s in program.sites) or program.n_tokens != x.shape[1]:
            raise ModelError(
                f"observed site {program.observed!r} must hold the {x.shape[1]} cells of each row, each with a "
                'density of its own, inside pyro.plate("rows", len(x)): append .to_event(1) to their distribution'
            )
        found = SelfPredicting(self, model, program)
        found.examine(x)
        return found


class SelfPredicting(Bound):
    """A program that is conditioned on the mask and has no latents."""

    name = "SelfPredictive"
    why = "the program is conditioned on the mask and has no latents"
    model: Model
    structure: Program

    def __init__(self, settings: SelfPredictive, model: Model, program: Program):
        self.settings, self.model, self.structure = settings, model, program
        self.blind = False
        """Whether no token's distribution looks at the token itself: one run gives all T that hide one."""
        self.blind_in_part = False
        """Whether that holds for rows with missing cells too."""

    def read(self, args: tuple[Any, ...]) -> SelfConditionals:
        return SelfConditionals(
            self.settings, self.model, self.structure, args[0], self.blind, self.blind_in_part
        )

    def schedule(self, whole: Batch, masks: Policy | None, seed: int = 0) -> list[Objective]:
        masks = OWN_MASKS if masks is None else masks
        return [
            Objective(
                self,
                whole,
                masks,
                noisy=not masks.deterministic,
                draw=_draw_own_or_fixed,
                trial=_trial,
                outputs=_outputs,
            )
        ]

    @torch.no_grad()
    def examine(self, x: Tensor) -> None:
        """Refuse a program whose rows look at each other; see whether tokens look at themselves."""
        x = fill(x)
        with one_precision((x,)):
            trace = poutine.trace(self.model).get_trace(x, visible=torch.ones_like(x, dtype=torch.bool))
        if not torch.equal(token_values(trace, self.structure), x):
            raise ModelError(
                f"the tokens of observed site {self.structure.observed!r} must be the cells of x, unchanged, so "
                "that hidden ones can be scored: write obs=x"
            )
        n_tokens = x.shape[1]
        some = x[torch.linspace(0, len(x) - 1, N_TRIAL).round().long()]
        found = self.read((some,))
        with _shaken():
            everything = torch.ones_like(some, dtype=torch.bool)
            seeing_all = found._run(some, everything)
            alone = torch.cat(
                [found._run(row[None], e[None]) for row, e in zip(some, everything, strict=True)]
            )
            if not _close(seeing_all, alone):
                raise ModelError(
                    "a row's distribution changes with the other rows of the batch, or from run to run (batch "
                    "normalisation, dropout): a row must be predicted from its own visible tokens alone"
                )
            if _close(seeing_all, found._run(some, ~everything)):
                return  # nothing looks at anything
            if factor_nodes(trace):
                return  # which may look at what is hidden
            each = ~torch.eye(n_tokens, dtype=torch.bool, device=x.device)
            hiding_one = found._score_hidden(some, each)  # (T, N, T)
            self.blind = _close(hiding_one.diagonal(dim1=0, dim2=2), seeing_all)
            if self.blind:
                holes = torch.arange(len(some), device=x.device)[:, None] % n_tokens == torch.arange(
                    n_tokens, device=x.device
                )
                part = torch.where(holes, torch.nan, some)
                hiding_one = found._score_hidden(part, each).diagonal(dim1=0, dim2=2)
                self.blind_in_part = _close(hiding_one, torch.where(holes, 0.0, found._run(part, everything)))
        if self.blind:
            self.why += "; no token looks at itself, so that one run gives all that are hidden alone"


def _trial(objective: Objective) -> Batch:
    return objective.whole.take(spread_rows(len(objective.whole.args[0]), N_TRIAL_OUTPUTS))


def _outputs(objective: Objective, read: Conditionals | None) -> Outputs:
    found = objective.by_row(objective.read(objective.trial))
    return Outputs(found / math.sqrt(len(found)), few_rows=True)


def _draw_own_or_fixed(masks: Policy | None, rows: Tensor, generator: torch.Generator | None) -> Masks:
    """Masks of each row's own; where no draw is asked for, one that stays."""
    assert masks is not None
    return _draw_own(masks, rows, torch_generator(0) if generator is None else generator)


def _draw_own(policy: Policy, rows: Tensor, generator: torch.Generator) -> Masks:
    """A draw of which each row (N, T) has one mask; all masks of a policy that is a sum over them, or chains."""
    draw = policy.draw(rows.shape[1], generator)
    if draw.visible is None or policy.deterministic:
        return draw
    return one_each(draw, len(rows), generator)


def on_own_masks(read: Conditionals, generator: torch.Generator) -> Tensor:
    """The score (N,) of each row of a network's on one mask of its own: in expectation that on all masks."""
    return read.score(_draw_own(OWN_MASKS, read.value, generator))


class SelfConditionals(Conditionals):
    """Rows under the program, run once for every mask. Masks may be each row's own, (S, N, T)."""

    structure: Program

    def __init__(
        self,
        settings: SelfPredictive,
        model: Model,
        program: Program,
        rows: Tensor,
        blind: bool = False,
        blind_in_part: bool = False,
    ):
        self.settings, self.structure, self.value, self.scale = settings, program, rows, program.scale
        self.blind, self.blind_in_part = blind, blind_in_part
        self._model, self._leaves = model, Leaves(program.parameters)

    # --------------------------------------------------------------------------------------------------- the scores

    def at(self, tokens: Tensor) -> SelfConditionals:
        return SelfConditionals(
            self.settings, self._model, self.structure, tokens, self.blind, self.blind_in_part
        )

    def conditionals(self, visible: Tensor) -> Tensor:
        return self._score_hidden(self.value, visible)

    def _score_hidden(self, x: Tensor, visible: Tensor) -> Tensor:
        """`conditionals` of rows x."""
        n_masks, n = len(visible), len(x)
        hidden = ~visible.expand(n_masks, n, -1) if visible.ndim == 3 else ~visible[:, None].expand(-1, n, -1)
        parts = [
            torch.where(hidden[mask, row] & ~x[row].isnan(), self._run(x[row], ~hidden[mask, row]), 0.0)
            for mask, row in self._pairs(n_masks, x)
        ]
        return torch.cat(parts).reshape(n_masks, n, -1)

    def _over(self, visible: Tensor, weight: Tensor) -> Tensor:
        x = self.value
        if visible.ndim == 3 or not self.blind:
            return self._over_each(x, visible, weight)
        alone = (~visible).sum(1) == 1
        if not bool(alone.any()):
            return self._over_each(x, visible, weight)
        quick = ~x.isnan().any(1) | self.blind_in_part  # (N,): one run for all masks that hide one token
        once = (weight * ~visible)[alone].sum(0)
        some, others = quick.nonzero()[:, 0], (~quick).nonzero()[:, 0]
        everything = torch.ones_like(x, dtype=torch.bool)
        by_token = [self._run(x[some][row], everything[row]) for _, row in self._pairs(1, x[some])]
        total = x.new_zeros(len(x))
        if by_token:
            found = torch.where(x[some].isnan(), 0.0, torch.cat(by_token)) @ once
            total = total.index_add(0, some, found)
        if len(others):
            found = self._over_each(x[others], visible[alone], weight[alone])
            total = total.index_add(0, others, found)
        return total + self._over_each(x, visible[~alone], weight[~alone])

    def _over_each(self, x: Tensor, visible: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum, every mask by itself."""
        total = x.new_zeros(len(x))
        spec = "snt,snt->n" if weight.ndim == 3 else "snt,st->n"
        step = max(1, at_once(RUN_CELLS, x.device) // max(1, x.numel()))
        for i in range(0, len(visible), step):
            part = self._score_hidden(x, visible[i : i + step])
            total = total + torch.einsum(spec, part, weight[i : i + step])
        return total

    def chain(self, order: Tensor, stops: list[int] | None = None) -> Tensor:
        x = self.value
        n_chains, n_tokens = order.shape
        place = order.argsort(dim=1)  # (C, T): when a token's turn comes
        steps = []
        for step, row in self._pairs(n_chains * n_tokens, x):  # step c T + t of chain c
            c, t = step // n_tokens, step % n_tokens
            token = order[c, t][:, None]
            log_prob = self._run(x[row], place[c] < t[:, None])
            steps.append(torch.where(x[row].isnan(), 0.0, log_prob).gather(1, token)[:, 0])
        by_step = torch.cat(steps).reshape(n_chains, n_tokens, len(x))
        return by_step.gather(1, place[..., None].expand_as(by_step)).mT

    def _joint(self) -> Tensor:
        return torch.stack([self.chain(order[None])[0].sum(1) for order in self._own_orders()]).mean(0)

    def _along(self, order: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("cnt,ct->n", self.chain(order), weight)

    def evidence(self, orders: Tensor | None = None) -> Evidence:
        """The mean over orders; its error over orders, and how far these disagree.

        Diagnostics: ``totals`` (C,) nats of all rows in each random order, and, where there are several orders of one's
        own, ``total_given_order`` in the order of the columns; ``order_sd`` the standard deviation between orders, root
        mean square over rows; ``log_mean_exp`` total nats of the rows under the mixture of the random orders, a
        normalised density.
        """
        own = self._own_orders() if orders is None else orders
        found = along_orders(torch.cat([self.chain(order[None]) for order in own]))
        found.diagnostics["n_orders"] = len(own)
        if orders is None and len(own) > 1:
            given = torch.arange(self.value.shape[1], device=self.value.device)[None]
            found.diagnostics["total_given_order"] = float(self.chain(given).detach().sum())
        return found

    def posterior(self, visible: Tensor | None = None) -> Posterior:
        x = self.value
        shown = ~x.isnan() if visible is None else visible & ~x.isnan()
        tokens = torch.cat([self._run(x[row], shown[row], _mean) for _, row in self._pairs(1, x)])
        return Posterior(
            x.new_zeros(len(x), 0),
            tokens,
            of_draws=lambda n: self._draws(torch.where(shown, x, torch.nan), n),
        )

    @torch.no_grad()
    def _draws(self, x: Tensor, n_draws: int) -> Tensor:
        """Missing tokens one after the other, in an order of each row and draw, given the observed and drawn ones."""
        rows = x.repeat(n_draws, 1)
        while bool(rows.isnan().any()):
            index = rows.isnan().any(1).nonzero()[:, 0]
            token = torch.multinomial(rows[index].isnan().to(x), 1)  # (B, 1)
            for _, part in self._pairs(1, rows[index]):
                some, at = rows[index[part]], token[part]
                drawn = self._run(some, ~some.isnan(), _drawn)
                rows[index[part]] = some.scatter(1, at, drawn.gather(1, at))
        return rows.reshape(n_draws, *x.shape)

    def _own_orders(self) -> Tensor:
        """Random orders (C, T), the same at every call."""
        n_tokens = self.value.shape[1]
        drawn = PermutationChain(self.settings.n_orders).draw(n_tokens, self.settings.random_state).order
        assert drawn is not None
        return drawn.to(self.value.device)

    # ------------------------------------------------------------------------------------------------------ running

    def _pairs(self, n_masks: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs of masks and rows, rows fastest, as many at a time as a run of the program takes."""
        total, step = n_masks * len(x), max(1, at_once(RUN_CELLS, x.device) // x.shape[1])
        for start in range(0, total, step):
            pair = torch.arange(start, min(start + step, total), device=x.device)
            yield pair // len(x), pair % len(x)

    def _run(self, x: Tensor, visible: Tensor, of: Callable[[Any, Tensor], Tensor] | None = None) -> Tensor:
        """log p(x_i | x_visible) (B, T) of every token of B rows, each under its own mask.

        Or what else ``of`` makes of the tokens' distributions and true values.
        """
        self._leaves.refuse_others()
        seen = visible & ~x.isnan()
        shown = torch.where(seen, x, 0.0)
        # the first run was checked; checks of each would cost a tenth of the time
        with one_precision((shown,)), pyro.validation_enabled(False):
            trace = poutine.trace(self._model).get_trace(shown, visible=seen)
        # Nothing but the distribution's own density of the true value, which the program has not seen.
        value, parts, start = fill(x, x.new_zeros(())), [], 0
        for site in self.structure.sites:
            fn = base(node_of(trace, site.name)["fn"])
            given = x if getattr(fn, "takes_missing", False) else value
            cells = _as_site(given[:, start : start + site.n_tokens], site.shape, site.row_axis)
            found = log_density(fn, cells) if of is None else of(fn, cells)
            parts.append(rows_first(found.to(x), site.row_axis))
            start += site.n_tokens
        by_token = torch.cat(parts, 1)
        if torch.is_grad_enabled() and of is None:
            for node in factor_nodes(trace):
                by_token = by_token + base(node["fn"]).log_factor[..., None]
        return by_token


def sees_all(model: Model) -> Model:
    """The program as one of ``x`` alone, of which it sees every cell; others as they are."""
    if not takes_visible(model):
        return model
    return lambda x: model(x, visible=torch.ones_like(x, dtype=torch.bool))


@contextmanager
def _shaken() -> Iterator[None]:
    """Parameters with noise added, so that what they let a program look at shows; then as they were."""
    leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
    before = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    try:
        for leaf in leaves:
            leaf += SHAKE * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        yield
    finally:
        for leaf, value in zip(leaves, before, strict=True):
            leaf.copy_(value)


def _mean(fn: Any, value: Tensor) -> Tensor:
    # the likeliest stands for the mean, which codes do not have
    return fn.mode if bool(fn.mean.isnan().all()) else fn.mean


def _drawn(fn: Any, value: Tensor) -> Tensor:
    return fn.sample()


def _close(a: Tensor, b: Tensor) -> bool:
    least = torch.finfo(b.dtype).eps
    return bool(((a - b).abs() <= min(CLOSE * least, least**0.5) * (1 + b.abs())).all())


def _as_site(cells: Tensor, shape: tuple[int, ...], row_axis: int | None) -> Tensor:
    """(B, tokens of a site) in the layout of its value."""
    assert row_axis is not None
    return from_rows(cells, shape, row_axis)
