"""Where masks and predictors meet: the weighted sum, its estimate with an error, and the loss.

score(x) = sum_k sum_i weight[k, i] * log p(x_i | x_visible[k])        (arXiv 2306.00520, Prop. 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.infer import ELBO
from torch import Tensor

from bayes_mpt.curves import Curve, RateCurve
from bayes_mpt.diagnostics import replicate_error
from bayes_mpt.masks import (
    FixedRate,
    Masks,
    Policy,
    RandomState,
    require_lml,
    torch_generator,
)
from bayes_mpt.predictors import Batch, Conditionals, Evidence, Objective, Predictor, choose
from bayes_mpt.predictors.base import CHUNK
from bayes_mpt.predictors.objective import chains_unless_own
from bayes_mpt.predictors.own_order import own_order, refuse_masks
from bayes_mpt.predictors.self_predictive import OWN_MASKS
from bayes_mpt.program.program import Model, Order, list_names
from bayes_mpt.program.run import signature_of
from bayes_mpt.runtime.serial import left_as_found, methods_take_turns, takes_turns, turn

__all__ = [
    "OWN_MASKS",
    "Bias",
    "CumulativeMaskedScore",
    "Curve",
    "RateCurve",
    "ScoreEstimate",
    "estimate",
    "fixed_rate_bias",
]

MAX_RUNS = 32  # of a program for the curve along one chain, where each visible set takes one


# --------------------------------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class ScoreEstimate:
    """Log marginal likelihood of each row, with what shows whether it is reliable."""

    lml: NDArray[np.float64]
    """(N,) nats."""
    se: float
    """Standard error of ``total``: over masks, from independent replicates' totals, or of the predictor where the masks
    are a chain; 0 if exact, NaN if unknown."""
    by_size: Curve | None
    """S(m), the mean over masks of a size; None where tokens look at each other, and there is one order only."""
    integrated: tuple[str, ...]
    """Latent sites integrated out."""
    point_estimated: tuple[str, ...]
    """`pyro.param`s held at their values: the number is conditional on them."""
    exact: bool
    """Whether the conditionals and the sum over masks are both without error."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    prequential: NDArray[np.float64] | None = None
    """(N, T) nats where tokens look at each other: each token given those before it, in the program's own order.

    0 of a missing token. Where every step takes a run of the program, the mean of a stretch of them."""
    given: tuple[str, ...] = ()
    """Cells that are looked at and never scored: the number is conditional on them."""

    @property
    def total(self) -> float:
        """Sum over rows, nats."""
        return float(self.lml.sum())

    def __str__(self) -> str:
        """One line: the number, its error, and what was integrated."""
        if self.exact:
            error = "exact"
        else:
            error = "standard error unknown" if math.isnan(self.se) else f"standard error {self.se:.2g}"
        rows = f"{len(self.lml)} row" + "s" * (len(self.lml) != 1)
        return (
            f"log marginal likelihood {self.total:.10g} nats of {rows} ({error}); "
            f"integrated: {list_names(self.integrated) or 'nothing'}; "
            f"point-estimated: {list_names(self.point_estimated) or 'nothing'}"
            + (f"; given: {list_names(self.given)}" if self.given else "")
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the area under the masked curve; see `bayes_mpt.plots.MaskedCurveDisplay`."""
        from bayes_mpt.plots import MaskedCurveDisplay

        if self.by_size is None:
            refuse_masks("the curve by mask size")
        assert self.by_size is not None
        return MaskedCurveDisplay(self.by_size).plot(ax)


def estimate(
    read: Conditionals,
    masks: Policy,
    *,
    n_replicates: int = 8,
    random_state: RandomState = None,
    curve_rows: tuple[Tensor, Tensor] | None = None,
) -> ScoreEstimate:
    """Estimate the LML of rows by a mask policy.

    Parameters
    ----------
    read : Conditionals
        Of the rows.
    masks : Policy
        With ``is_lml``; of a program ``model(x, visible)`` also in `Blocks`.
    n_replicates : int, default=8
        R, independent draws of the policy; the standard error needs two.
    random_state : int, torch.Generator or None
        For the draws.
    curve_rows : (Tensor, Tensor), optional
        Weighted rows that stand for those read (of `SufficientStatistics`), to average the curve of chains
        over.

    Returns
    -------
    ScoreEstimate

    Raises
    ------
    ValueError
        If the policy's expectation is not the LML. If tokens look at each other, and it is no `PermutationChain`.
    """
    require_lml(masks, "estimate", independent=read.structure.takes_visible)
    if n_replicates < 1:
        raise ValueError(f"n_replicates must be at least 1, got {n_replicates}")
    if read.structure.order is not None:
        return _in_own_order(read, masks, read.structure.order)
    generator = torch_generator(random_state)
    x = read.value
    draws = [masks.draw(x.shape[1], generator) for _ in range(n_replicates)]
    with torch.no_grad():
        if draws[0].order is not None:
            found, known = _along_chains(read, draws)
            some, weight = (read, None) if curve_rows is None else (read.at(curve_rows[0]), curve_rows[1])
        else:
            both = [_by_row_and_mask(read, draw) for draw in draws]
            known, some, weight = [by_mask for _, by_mask in both], read, None
            scores = torch.stack([by_row for by_row, _ in both])  # (R, N)
            found = _of_replicates(scores, {})
        curve = _curve(some, x.new_ones(len(x)) if weight is None else weight, draws, known)
    return _estimate(read, found, curve, n_replicates, repr(masks))


def _estimate(
    read: Conditionals, found: Evidence, curve: Curve | None, n_replicates: int, masks: str, **more: Any
) -> ScoreEstimate:
    """What was found, with what was integrated and how."""
    return ScoreEstimate(
        found.by_row.double().cpu().numpy(),
        found.se,
        curve,
        read.structure.latent_names,
        read.structure.parameters,
        exact=found.exact,
        diagnostics={"n_replicates": n_replicates, "masks": masks, "totals": None, **found.diagnostics},
        **more,
    )


@torch.no_grad()
def _in_own_order(read: Conditionals, masks: Policy, order: Order) -> ScoreEstimate:
    """The estimate where tokens look at each other: one chain, and no curve over mask sizes."""
    if not masks.any_order:
        refuse_masks(f"{masks!r}")
    found, tokens = read.evidence(), own_order(read)
    steps = read.chain(tokens, _ends(tokens.shape[1]))[0][:, tokens[0]]
    return _estimate(
        read,
        found,
        None,
        1,
        "the program's own order",
        prequential=steps.double().cpu().numpy(),
        given=order.given,
    )


def _ends(n_tokens: int) -> list[int] | None:
    """Where every step costs a run of the program, the ends of stretches of them; None for single steps."""
    return [round(n_tokens * b / MAX_RUNS) for b in range(MAX_RUNS + 1)] if n_tokens > MAX_RUNS else None


def _of_replicates(scores: Tensor, diagnostics: dict[str, Any]) -> Evidence:
    """The mean of independent scores (R, N), their spread its error."""
    totals = scores.sum(1).double().cpu().numpy()
    return Evidence(scores.mean(0), replicate_error(totals), {**diagnostics, "totals": totals}, exact=False)


def _along_chains(read: Conditionals, draws: list[Masks]) -> tuple[Evidence, list[Tensor] | None]:
    """The evidence, and the steps (C, N, T) of each draw where chains do not add up to the same."""
    orders = [draw.order.to(read.value.device) for draw in draws if draw.order is not None]
    found = read.evidence(torch.cat(orders))
    if found.steps is None:
        return found, None
    steps = list(found.steps.split([len(order) for order in orders]))
    scores = [
        torch.einsum("cnt,ct->n", part, draw.weight.to(part)) for part, draw in zip(steps, draws, strict=True)
    ]
    return _of_replicates(torch.stack(scores), found.diagnostics), steps


def _by_row_and_mask(read: Conditionals, draw: Masks) -> tuple[Tensor, Tensor]:
    """The score of each row (N,), and of each mask (S,) the mean over rows and tokens scored."""
    assert draw.visible is not None
    x = read.value
    weight = draw.weight.to(x)
    # of a chain of blocks not all that is hidden
    scored = weight / weight.sum(1, keepdim=True)
    by_row, by_mask = x.new_zeros(len(x)), []
    step = max(1, CHUNK // max(1, x.numel()))
    for i in range(0, len(weight), step):
        found = read.conditionals(draw.visible[i : i + step].to(x.device))  # (S', N, T)
        by_row = by_row + torch.einsum("snt,st->n", found, weight[i : i + step])
        by_mask.append(torch.einsum("snt,st->s", found, scored[i : i + step]) / len(x))
    return by_row, torch.cat(by_mask)


def _curve(read: Conditionals, weight: Tensor, draws: list[Masks], known: list[Tensor] | None) -> Curve:
    """Group the masks' means by size: S(m) is the mean over masks of the mean over tokens scored.

    Rows are weighted (N,). ``known`` of each draw: the steps of its chains (C, N, T), or the means of its masks (S,).
    """
    n_tokens = read.value.shape[1]
    share = weight / weight.sum()
    ends = _ends(n_tokens)
    sizes, values = [], []
    for r, draw in enumerate(draws):
        if draw.order is not None:
            for c, tokens in enumerate(draw.order.to(read.value.device)):
                sizes.append(torch.arange(n_tokens, 0, -1))
                steps = read.chain(tokens[None], ends)[0] if known is None else known[r][c]  # (N, T)
                by_token = share @ steps  # (T,)
                values.append(by_token[tokens].cpu())
        else:
            assert draw.visible is not None and known is not None
            sizes.append((~draw.visible).sum(1))
            values.append(known[r].cpu())
    size, value = torch.cat(sizes).numpy(), torch.cat(values).double().numpy()
    count = np.bincount(size, minlength=n_tokens + 1)[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(size, value, minlength=n_tokens + 1)[1:] / count
        # around each size's own mean, or the squares would cancel
        spread = np.bincount(size, (value - mean[size - 1]) ** 2, minlength=n_tokens + 1)[1:]
        se = np.where(count > 1, np.sqrt(spread / (count - 1) / count), np.nan)
    return Curve(np.arange(1, n_tokens + 1), mean, se)


class Bias(NamedTuple):
    """What training at a fixed rate leaves out, nats a row."""

    value: float
    """B = LML - T S(m)."""
    se: float
    """Standard error over masks; 0 where all masks of the size were enumerated."""


def fixed_rate_bias(
    estimator: Any, X: ArrayLike, rate: float, *, n_masks: int = 1000, random_state: RandomState = None
) -> Bias:
    """Compute the bias of the masked score at one fixed rate, B = LML - T S(m), at the fitted parameters.

    Parameters
    ----------
    estimator : BayesMPT
        Fitted, with an exact predictor.
    X : array-like of shape (N, T)
        Rows to average over.
    rate : float
        Share of hidden tokens; m = round(rate T), at least 1.
    n_masks : int, default=1000
        Masks of size m: all of them where there are no more than this, otherwise as many random ones.
    random_state : int, torch.Generator or None
        For the random ones.

    Returns
    -------
    Bias
        Mean over rows, nats.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.models import PPCA
    >>> X = load_iris().data
    >>> bias = fixed_rate_bias(BayesMPT(PPCA(1)).fit(X), X, rate=0.25)
    >>> bias.value < 0, bias.se  # low rates see too many visible tokens; here all masks were enumerated
    (True, 0.0)
    """
    with estimator.read_rows(X) as read:
        return _bias(read, rate, n_masks, random_state)


def _bias(read: Conditionals, rate: float, n_masks: int, random_state: RandomState) -> Bias:
    x = read.value
    n_tokens = x.shape[1]
    policy = FixedRate(rate, n_masks)
    size = policy.size(n_tokens)
    n_all = math.comb(n_tokens, size)
    if n_all <= n_masks:
        hidden = torch.combinations(torch.arange(n_tokens), size)
        visible = torch.ones(n_all, n_tokens, dtype=torch.bool).scatter_(1, hidden, False)
    else:
        drawn = policy.draw(n_tokens, random_state).visible
        assert drawn is not None
        visible = drawn
    with torch.no_grad():
        lml = read.score().mean()
        step = max(1, CHUNK // max(1, x.numel()))
        by_mask = [
            read.conditionals(visible[i : i + step].to(x.device)).sum(-1).mean(-1)
            for i in range(0, len(visible), step)
        ]
    # T S(m) = mean over masks of (T / m) sum over hidden tokens
    term = torch.cat(by_mask) * (n_tokens / size)
    se = 0.0 if n_all <= n_masks else float(term.std() / math.sqrt(len(term)))
    return Bias(float(lml - term.mean()), se)


# --------------------------------------------------------------------------------------------------------- the loss


@methods_take_turns()
class CumulativeMaskedScore(ELBO):
    """The negative masked score of a Pyro program, as a loss for `pyro.infer.SVI` or any torch optimiser.

    Plate and `poutine.scale` factors are honoured, so that minibatches are scaled up to the whole data.

    Parameters
    ----------
    masks : Policy, optional
        What to hide; `PermutationChain` by default, of a program ``model(x, visible)`` one of 64 masks of `UniformSize`
        for each row. Any policy may be trained on.
    predictor : "auto" or Predictor, default="auto"
        How hidden tokens are predicted; chosen for the program at the first call, or when its shapes change.
    random_state : int, torch.Generator or None
        For the draws of masks, a fresh one each step.

    Examples
    --------
    With SVI:

    >>> import pyro, pyro.distributions as dist
    >>> from bayes_mpt.models import PPCA
    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> pyro.clear_param_store()
    >>> svi = pyro.infer.SVI(PPCA(1), lambda x: None, pyro.optim.Adam({"lr": 0.01}), CumulativeMaskedScore())
    >>> first = svi.step(x)
    >>> losses = [svi.step(x) for _ in range(20)]
    >>> losses[-1] < first
    True

    With a torch optimiser:

    >>> pyro.clear_param_store()
    >>> loss = CumulativeMaskedScore()(PPCA(1), None, x)
    >>> optimiser = torch.optim.Adam(loss.parameters(), lr=0.01)
    >>> value = loss(x)
    >>> value.backward()
    """

    def __init__(
        self,
        masks: Policy | None = None,
        predictor: str | Predictor = "auto",
        random_state: RandomState = None,
    ):
        super().__init__()
        self.masks = masks
        self.predictor = predictor
        self.generator = torch_generator(random_state)
        self._chosen: tuple[Any, Any, tuple[Any, ...], Objective] | None = None

    def __call__(self, model: Model, guide: Any = None, *example: Any) -> _LossModule:
        # Pyro's own takes (model, guide) and registers nothing of a plain function; the example makes its parameters.
        return _LossModule(self, model, guide, example)

    def differentiable_loss(self, model: Model, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The negative score of the batch as a scalar tensor, nats."""
        args = _positional(model, args, kwargs)
        return -self._objective(model, guide, args)(Batch(args, len(args[0])), self.generator)

    def loss(self, model: Model, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative score of the batch, nats."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Model, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The negative score of the batch; its gradients are added to the parameters' ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Model, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("the masked score reads the program itself: there is no single trace")

    def _objective(self, model: Model, guide: Any, args: tuple[Any, ...]) -> Objective:
        # Anything but the number of rows may change what the program is.
        key = tuple(a.shape[1:] if isinstance(a, Tensor) and a.ndim else repr(a) for a in args)
        if self._chosen is None or self._chosen[:3] != (model, guide, key):
            bound = choose(model, args, predictor=self.predictor, guide=guide)
            masks = chains_unless_own(bound) if self.masks is None else self.masks
            found = bound.schedule(Batch(args, len(args[0])), masks)[-1]
            self._chosen = (model, guide, key, found)
        return self._chosen[3]


def _positional(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of the program's signature."""
    if not kwargs:
        return args
    bound = signature_of(model).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"keyword-only arguments {sorted(bound.kwargs)} cannot be scored: make them positional"
        )
    return bound.args


class _LossModule(torch.nn.Module):
    """The loss of one program as a torch module that owns the program's parameters."""

    def __init__(self, loss: CumulativeMaskedScore, model: Model, guide: Any, example: tuple[Any, ...]):
        super().__init__()
        self.loss = loss
        self.model = model
        self.guide = guide
        if not example:
            raise TypeError(
                "CumulativeMaskedScore()(model, guide, *example) needs an example batch: the program's parameters are "
                "created when it runs"
            )
        with turn(), left_as_found(store=True), pyro.get_param_store().scope() as state:
            loss.loss(model, guide, *example)
        self._constraints = state["constraints"]
        self._leaves = list(state["params"])
        for i, name in enumerate(self._leaves):
            leaf = state["params"][name]
            self.register_parameter(
                f"p{i}", leaf if isinstance(leaf, torch.nn.Parameter) else torch.nn.Parameter(leaf)
            )

    @takes_turns
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss on a batch: total nats, to minimise."""
        with pyro.get_param_store().scope({"params": self.named_leaves(), "constraints": self._constraints}):
            return self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)

    def named_leaves(self) -> dict[str, Tensor]:
        """Unconstrained parameters by their Pyro names."""
        return {name: getattr(self, f"p{i}") for i, name in enumerate(self._leaves)}
