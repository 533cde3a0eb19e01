"""A transformer that predicts its own hidden tokens, and the contrastive loss with tied weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayes_mpt.models.checks import (
    CheckedModel,
    Instance,
    IntegersFrom,
    OneOf,
    check_memory,
    skipped_levels,
    unmasked,
)
from bayes_mpt.models.networks import check_heads, check_layers, codes_of

__all__ = ["MaskedTransformer", "OptimizedMask", "contrastive_loss"]

HEADS = ("softmax", "contrastive")
RAREST = 1e-2  # probability of a code at the start, shared by those that a column never shows
MAX_LEVELS = 2**15  # of a column that nothing was said of: more are no codes
PART = 2**25  # logits that are held at once
START = 0.02  # sd of embeddings and of what is added to the residual stream
NOWHERE = -1e4  # a logit whose exponential is zero, and whose product with that too


@dataclass(frozen=True)
class OptimizedMask:
    """What is asked of a mask token and of the attention to it: masked token optimisation, reconstructed.

    With M hidden and R visible tokens of a row, layers l = 1, ..., L, and g_l falling evenly from one to zero in the
    last of the layers (with one layer, one), training minimises the loss of each hidden token plus

        spatial    L_spa = sum_l g_l a_l / sum_l g_l,    a_l: attention of visible tokens to hidden ones, mean over R
        singular   L_e = 1 - H^0
        falling    L_r = sum_l relu(H^l - H^(l-1) + margin)

    each times its weight. H^l is how little a hidden token's state after layer l resembles any visible one's in
    particular, the entropy of the affinities between them as a share of its greatest value, mean over M:

        P_ij = softmax over visible j of cos(h_i, h_j) / temperature,        H = - mean_i sum_j P_ij log P_ij / log |R|

    with H^0 that of the embeddings alone, without positions, and H = 1 where fewer than two are visible or none hidden.
    These are sites `pyro.factor`, named as the weights are: they train, and enter no score. A reconstruction from the
    abstract and summaries of arXiv 2404.08330, whose formulas and code were not available: not the authors' losses.

    Parameters
    ----------
    recalibrate : bool, default=True
        Add log(1 - g_l) to the attention logits from visible to hidden tokens: no attention in the first layer, all
        of it in the last.
    spatial, singular, falling : float
        Weights in nats a hidden token; 0 leaves a term out.
    margin : float, default=0.0
        By how much H is to fall from layer to layer.
    temperature : float, default=0.1
        Of the affinities.
    """

    recalibrate: bool = True
    spatial: float = 0.1
    singular: float = 0.1
    falling: float = 0.1
    margin: float = 0.0
    temperature: float = 0.1


MASK_TOKENS = {"learned": OptimizedMask(False, 0.0, 0.0, 0.0), "optimized": OptimizedMask()}


class MaskedTransformer(CheckedModel):
    """A small bidirectional transformer of categorical tokens: what each hidden one is, given the visible ones.

        h_i = p_i + (e(x_i) where visible, else the mask token);    L times:  h += attention(norm h),  h += mlp(norm h)
        log p(x_i = a | visible) = e(a)' norm(h_i) + b_i(a) - log of the sum over a

    The output is tied to the input embedding e, and its bias starts at the log shares of each column, so that the
    training starts at independent columns. Rows are codes 0, ..., L - 1 held as floats; NaN is missing. Parameters:
    "embedding" (G, L, D), "mask" (D,), "position" (T, D), "bias" (T, L) or "unigram" (G, L), and those of the layers.

    Parameters
    ----------
    width : int, default=64
        D, a multiple of ``n_heads``.
    n_layers : int, default=2
        Each of attention and of a network of one hidden layer of 4 D, pre-norm.
    n_heads : int, default=4
        Of the attention.
    n_levels : int or sequence of int, optional
        L, for all columns or of each one; then codes that a column cannot have get no probability. None takes the
        largest code of the first rows, and one, for all columns; what a column never shows begins rare.
    groups : sequence of int, optional
        For each column its group; the columns of one share the embeddings of their codes. None: all of them, as for
        the letters of a sequence or the grey levels of pixels; ``range(T)``: a code means another thing in each.
    mask_token : {"learned", "optimized"} or OptimizedMask, default="learned"
        "optimized" is ``OptimizedMask()``: visible tokens do not attend to hidden ones in early layers, and penalties
        hold the mask token away from what it hides. A reconstruction of masked token optimisation (arXiv 2404.08330),
        not the authors' losses. "learned": nothing of this.
    head : {"softmax", "contrastive"}, default="softmax"
        "contrastive": trained on negatives from the batch (arXiv 2309.08351), `contrastive_loss` over its hidden cells;
        read out as p(a) proportional to q(a) exp(e(a)' norm(h)), with q the frequency of the code over all hidden
        cells. A step then computes nothing for codes that are not in the batch: for vocabularies of thousands.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> rng = np.random.default_rng(0)
    >>> X = (np.arange(6) + rng.integers(3, size=(300, 1))) % 3.0  # a cycle: one token tells the others
    >>> settings = {"max_iter": 30, "learning_rate": 0.01, "validation_fraction": 0.0, "random_state": 0}
    >>> fitted = BayesMPT(MaskedTransformer(16, 1, 2), **settings).fit(X)
    >>> bool(abs(fitted.score(X) + np.log(3)) < 0.1)
    True
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    """Of rows and network."""
    batch_size: ClassVar[int] = 128
    """Rows a step of the training, unless another number is asked for."""
    learning_rate: ClassVar[float] = 1e-3
    """Of Adam, likewise."""
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "width": [IntegersFrom(1)],
        "n_layers": [IntegersFrom(1)],
        "n_heads": [IntegersFrom(1)],
        "n_levels": [IntegersFrom(1), "array-like", None],
        "groups": ["array-like", None],
        "mask_token": [OneOf(*MASK_TOKENS), Instance(OptimizedMask, "an OptimizedMask")],
        "head": [OneOf(*HEADS)],
    }

    def __init__(
        self,
        width: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        *,
        n_levels: int | Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        mask_token: Literal["learned", "optimized"] | OptimizedMask = "learned",
        head: Literal["softmax", "contrastive"] = "softmax",
    ):
        self.width = width
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_levels = n_levels
        self.groups = groups
        self.mask_token = mask_token
        self.head = head

    def __call__(self, x: Tensor, visible: Tensor) -> None:
        """Run the program on codes x (N, T), of which (N, T) are visible; what x holds elsewhere is not looked at."""
        self._validate_params()
        check_layers(self.width, self.n_layers, x)
        shown = torch.where(visible, x, 0.0)
        group, n_levels = self._groups(x), self._levels(shown)  # (T,), (T,)
        codes = codes_of(shown, n_levels)
        n_groups, most = int(group.max()) + 1, int(n_levels.max())
        contrastive = self.head == "contrastive"
        row = (
            group if contrastive else torch.arange(x.shape[1], device=x.device)
        )  # of the biases, for each column
        n_biases = int(row.max()) + 1
        check_memory(
            f"embeddings and biases of {n_groups * most} codes",
            n_groups * most * self.width + n_biases * most,
            x,
            "merge rare codes into one (n_levels), or take a smaller width",
        )
        embedding = _normal("embedding", n_groups, most, self.width)
        table = _LookedUp.apply(embedding.flatten(0, 1))  # (V, D)
        h, states, mass = self._encode(
            F.embedding(group * most + codes, table, sparse=True), visible
        )  # (N, T, D)
        bias = pyro.param(
            "unigram" if contrastive else "bias", lambda: _log_shares(codes, row, n_biases, most).to(x)
        )  # (G, L) or (T, L)
        tokens = _Codes(h, table, bias, group, n_levels, ~visible, contrastive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", tokens.to_event(1), obs=x)
            for name, penalty in self._penalties(states, mass, visible).items():
                pyro.factor(name, -penalty)

    def heterogeneity(
        self, params: Mapping[str, ArrayLike], X: ArrayLike, visible: ArrayLike
    ) -> NDArray[np.float64]:
        """H^l of the embeddings and after each layer (n_layers + 1,), mean over rows: see `OptimizedMask`.

        Parameters
        ----------
        params : mapping
            Parameters of the program (``BayesMPT.params_``).
        X : array of shape (N, T)
            Codes; NaN is missing, and hidden.
        visible : bool array of shape (N, T)
            Rows with fewer than two visible tokens, or none hidden, are left out.
        """
        x = torch.as_tensor(np.asarray(unmasked(X)))
        seen = torch.as_tensor(np.asarray(visible)) & ~x.isnan()
        some = (seen.sum(1) > 1) & ~seen.all(1)
        x, seen = x[some], seen[some]
        with pyro.get_param_store().scope(), torch.no_grad():
            for name, value in params.items():
                pyro.param(name, torch.as_tensor(np.asarray(value)))
            codes = torch.where(seen, x, 0.0).long()
            _, states, _ = self._encode(pyro.param("embedding")[self._groups(x), codes], seen)
            found = [_heterogeneity(h, seen, self._mask.temperature).mean() for h in states]
        return torch.stack(found).double().numpy()

    def _encode(self, tokens: Tensor, visible: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Embedded tokens (N, T, D), hidden ones replaced: the last states, those of each layer, and `_attend`'s mass.

        The first of the L + 1 states are without positions.
        """
        n, n_tokens, d = tokens.shape
        heads = (n, n_tokens, self.n_heads, d // self.n_heads)
        h = torch.where(visible[..., None], tokens, _normal("mask", d))
        states, mass = [h], []
        h = h + _normal("position", n_tokens, d)
        for layer in range(self.n_layers):
            name = f"layer{layer}"
            qkv = F.linear(_norm(f"{name}.norm1", h), _normal(f"{name}.attend", 3 * d, d, sd=d**-0.5))
            q, k, v = (part.reshape(heads).transpose(1, 2) for part in qkv.chunk(3, -1))  # (N, H, T, D/H)
            found, on_hidden = self._attend(layer, q, k, v, visible)
            found = found.transpose(1, 2).reshape(n, n_tokens, d)
            h = h + F.linear(found, _normal(f"{name}.attended", d, d))
            up = F.linear(
                _norm(f"{name}.norm2", h),
                _normal(f"{name}.up", 4 * d, d, sd=d**-0.5),
                pyro.param(f"{name}.up_bias", lambda: torch.zeros(4 * d)),
            )
            h = h + F.linear(F.gelu(up), _normal(f"{name}.down", d, 4 * d))
            states.append(h)
            mass.append(on_hidden)
        return _norm("norm", h), states, mass

    @property
    def _mask(self) -> OptimizedMask:
        given = self.mask_token
        return given if isinstance(given, OptimizedMask) else MASK_TOKENS[given]

    def _early(self, layer: int) -> float:
        """g_l, from one to zero."""
        return 1 - layer / max(1, self.n_layers - 1)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens find (N, H, T, D/H), and the share of their attention that visible ones pay to hidden ones (N,).

        The share is zero where nobody asks for it.
        """
        early, mask = self._early(layer), self._mask
        added = None
        if mask.recalibrate and early > 0:
            unseen = visible[:, :, None] & ~visible[:, None]  # (N, T, T): visible looks, hidden is looked at
            added = torch.where(unseen, math.log1p(-early) if early < 1 else -math.inf, 0.0).to(q)[:, None]
        if not mask.spatial or early == 0 or (mask.recalibrate and early == 1):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added), q.new_zeros(len(q))
        # one more column of values, which is one at hidden tokens, comes out as the attention to them
        hidden = (~visible).to(v)[:, None, :, None].expand(*v.shape[:3], 1)
        both = F.scaled_dot_product_attention(q, k, torch.cat([v, hidden], -1), attn_mask=added)
        return both[..., :-1], _mean_where(both[..., -1].mean(1), visible)

    def _penalties(self, states: list[Tensor], mass: list[Tensor], visible: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the mask token that are asked for, each (N,)."""
        mask, found = self._mask, {}
        if mask.spatial:
            early = [self._early(layer) for layer in range(self.n_layers)]
            weight = mask.spatial / sum(early)
            parts = [weight * g * m for g, m in zip(early, mass, strict=True)]
            found["spatial"] = torch.stack(parts).sum(0)
        if mask.singular or mask.falling:
            needed = states if mask.falling else states[:1]
            by_layer = torch.stack([_heterogeneity(h, visible, mask.temperature) for h in needed])
            if mask.singular:
                found["singular"] = mask.singular * (1 - by_layer[0])
            if mask.falling:
                found["falling"] = mask.falling * (by_layer.diff(dim=0) + mask.margin).relu().sum(0)
        return found

    def _validate_params(self) -> None:
        super()._validate_params()
        check_heads(self.width, self.n_heads)
        mask = self._mask
        weights = (mask.spatial, mask.singular, mask.falling, mask.margin, mask.temperature)
        if not all(isinstance(w, Real) and 0 <= w < math.inf for w in weights) or not mask.temperature:
            raise ValueError(
                f"weights and margin of mask_token must be at least 0, its temperature above 0, got {mask!r}"
            )

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.n_levels is None else []

    def _groups(self, x: Tensor) -> Tensor:
        """Group of each column (T,), numbered from 0."""
        n_tokens = x.shape[1]
        given = np.zeros(n_tokens) if self.groups is None else np.asarray(self.groups)
        if given.shape != (n_tokens,) or given.dtype.kind == "O":
            raise ValueError(
                f"groups must name one group for each of {n_tokens} columns, got {self.groups!r}"
            )
        return torch.as_tensor(np.unique(given, return_inverse=True)[1], device=x.device)

    def _levels(self, shown: Tensor) -> Tensor:
        """Number of levels of each column (T,)."""
        store, n_tokens = pyro.get_param_store(), shown.shape[1]
        if self.n_levels is not None:
            given = np.asarray(self.n_levels)
            if given.dtype.kind not in "iu" or given.shape not in ((), (n_tokens,)) or (given < 1).any():
                raise ValueError(
                    f"n_levels must be an integer of at least 1, or one for each of {n_tokens} columns, got "
                    f"{self.n_levels!r}"
                )
            return torch.as_tensor(np.broadcast_to(given, (n_tokens,)).copy(), device=shown.device)
        if "embedding" in store:
            found = int(store["embedding"].shape[1])
        else:
            top = shown.amax(0)  # (T,)
            found = int(top.max()) + 1
            if found > MAX_LEVELS:
                raise ValueError(
                    f"column {int(top.argmax())} holds {top.max():g}: columns must be codes 0, 1, ..., such as "
                    f"OrdinalEncoder makes; for more than {MAX_LEVELS} levels give n_levels"
                )
        return torch.full((n_tokens,), found, device=shown.device)


_Reading = Callable[[Tensor, Tensor], Tensor]  # of logits (K, C) and codes (K,)


class _Codes(dist.TorchDistribution):
    """What is said of the hidden codes: p(a) proportional to exp(b(a) + e(a)' h), b of the column or of its group.

    With the contrastive head, where gradients are tracked, the log-density of a hidden code is instead

        log q(x_i) + e(x_i)' h_i - log 1/K sum_{k hidden} exp(e(x_k)' h_i),    log q = b - log of the sum over all a

    whose last two terms are minus the contrastive loss, plus log K, and estimate log p(x_i | visible) / q(x_i). The sum
    runs over the different codes of the K hidden cells, each times its count, which is the same: of codes that are not
    in the batch nothing is computed. Visible cells get 0, unless all are visible; missing ones, NaN, are no negatives.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.nonnegative_integer
    takes_missing = True

    def __init__(
        self,
        h: Tensor,
        table: Tensor,
        bias: Tensor,
        group: Tensor,
        n_levels: Tensor,
        hidden: Tensor,
        contrastive: bool,
    ):
        self.states = h  # (N, T, D)
        self._table, self._bias = table, bias  # (G L, D), (T, L) or with the contrastive head (G, L)
        self._group, self._n_levels = group, n_levels  # (T,), (T,)
        self._asked = hidden if bool(hidden.any()) else ~hidden  # (N, T)
        self._contrastive = contrastive
        super().__init__(h.shape[:2], validate_args=False)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of all codes (N, T, L): much memory, which `log_prob` does without."""
        return self._read(torch.ones_like(self._asked), self._group.new_zeros(self.batch_shape), _all_of)

    @property
    def mode(self) -> Tensor:
        """The likeliest codes (N, T)."""
        return self._read(torch.ones_like(self._asked), self._group.new_zeros(self.batch_shape), _likeliest)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # as torch has it
        """Codes (N, T), each drawn for itself; of one draw only."""
        if sample_shape != torch.Size():
            raise NotImplementedError("one draw at a time")
        return self._read(torch.ones_like(self._asked), self._group.new_zeros(self.batch_shape), _drawn)

    @property
    def mean(self) -> Tensor:
        """Codes have none."""
        return self.states.new_full(self.batch_shape, torch.nan)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> _Codes:
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError("each cell has states of its own")
        return self  # a plate that the cells fill already

    def log_prob(self, value: Tensor) -> Tensor:
        cells = self._asked & ~value.isnan()
        codes = codes_of(torch.where(cells, value, 0.0), self._n_levels)  # (N, T)
        if self._contrastive and torch.is_grad_enabled():
            return self._in_batch(cells, codes)
        return self._read(cells, codes, _log_prob)

    def _read(self, cells: Tensor, codes: Tensor, what: _Reading) -> Tensor:
        """Something of the logits of these cells, (N, T, ...); of other cells 0."""
        bias, by_group, most = self._bias, self._contrastive, self._bias.shape[1]
        if bool((self._n_levels < most).any()):
            possible = torch.arange(most, device=bias.device) < self._n_levels[:, None]  # (T, L)
            bias = (bias[self._group] if by_group else bias).masked_fill(~possible, -torch.inf)
            by_group = False
        index = cells.flatten().nonzero()[:, 0]  # (K,)
        group = self._group.expand_as(cells).flatten()[index]
        index = index[group.argsort(stable=True)]
        size = group.bincount(minlength=len(self._table) // most).tolist()
        h, code = self.states.flatten(0, 1)[index], codes.flatten()[index]
        each = zip(*(t.split(size) for t in (h, index % len(self._group), code)), strict=True)
        found = [
            _by_parts(what, h_g, e, bias[g, None] if by_group else bias, column, code_g)
            for g, (e, (h_g, column, code_g)) in enumerate(zip(self._table.split(most), each, strict=True))
        ]
        return _spread(index, torch.cat(found), cells.shape)

    def _in_batch(self, cells: Tensor, codes: Tensor) -> Tensor:
        """What these cells learn from each other, (N, T); of other cells 0."""
        index = cells.flatten().nonzero()[:, 0]  # (K,)
        at = (self._group * self._bias.shape[1] + codes).flatten()[index]  # (K,) among all V = G L codes
        distinct, which, count = at.unique(return_inverse=True, return_counts=True)  # (U,), (K,), (U,)
        h = self.states.flatten(0, 1)[index]  # (K, D)
        e, times = F.embedding(distinct, self._table, sparse=True), count.to(h).log()  # (U, D), (U,)
        # e(x_i)' h_i + log count(x_i) - log sum_u count(u) exp(e(u)' h_i)
        found = _by_parts(_log_prob, h, e, times[None], torch.zeros_like(at), which)
        log_q = self._bias.flatten().log_softmax(0)[at]
        return _spread(index, log_q + found - times[which] + math.log(max(1, len(at))), cells.shape)


def contrastive_loss(out: Tensor, embedding: Tensor) -> Tensor:
    """Contrastive weight tying (Godey et al., arXiv 2309.08351): each output against the embeddings of all K tokens.

        -1/K sum_i log [ exp(o_i' e_i) / sum_k exp(o_i' e_k) ]

    the cross-entropy of the K x K logits whose truth is the diagonal; a repeated token is a negative too. It is no
    likelihood: the logits tend to log p(w | context) / q(w), with q the frequency of w in the batch, so that those of
    a vocabulary are e(w)' o + log q(w).

    Parameters
    ----------
    out : Tensor of shape (K, D)
        Last states at the hidden tokens.
    embedding : Tensor of shape (K, D)
        Input embeddings of what these tokens are.

    Examples
    --------
    >>> contrastive_loss(torch.zeros(4, 2), torch.ones(4, 2))  # log 4
    tensor(1.3863)
    """
    logits = out @ embedding.mT  # (K, K)
    return (logits.logsumexp(1) - logits.diagonal()).mean()


# ---------------------------------------------------------------------------------------------------------- helpers


def _by_parts(what: _Reading, h: Tensor, e: Tensor, bias: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """Something of the logits b(a) + e(a)' h of cells h (K, D) and codes e (C, D), and of each cell's own code (K,).

    ``bias`` is one row for all, or has a ``row`` for each cell. Logits of more than `PART` pairs are never held: on the
    way back they are computed again.
    """

    def some(h: Tensor, e: Tensor, bias: Tensor, row: Tensor, code: Tensor) -> Tensor:
        return what(torch.addmm(bias if len(bias) == 1 else bias.index_select(0, row), h, e.mT), code)

    size = max(1, PART // max(1, len(e)))
    if len(h) <= size:
        return some(h, e, bias, row, code)
    return torch.cat(
        [
            checkpoint(some, h_k, e, bias, row_k, code_k, use_reentrant=False, preserve_rng_state=False)
            for h_k, row_k, code_k in zip(h.split(size), row.split(size), code.split(size), strict=True)
        ]
    )


def _log_prob(logits: Tensor, code: Tensor) -> Tensor:
    return -F.cross_entropy(logits, code, reduction="none")


def _likeliest(logits: Tensor, code: Tensor) -> Tensor:
    return logits.argmax(1)


def _drawn(logits: Tensor, code: Tensor) -> Tensor:
    return torch.multinomial(logits.softmax(1), 1)[:, 0]


def _all_of(logits: Tensor, code: Tensor) -> Tensor:
    return logits.log_softmax(1)


def _spread(index: Tensor, found: Tensor, shape: torch.Size) -> Tensor:
    """Values (K, ...) at these of all cells (N, T, ...), elsewhere 0."""
    whole = found.new_zeros(shape.numel(), *found.shape[1:])
    return whole.index_copy(0, index, found).unflatten(0, shape)


def _normal(name: str, *shape: int, sd: float = START) -> Tensor:
    return pyro.param(name, lambda: sd * torch.randn(shape))


class _LookedUp(torch.autograd.Function):
    """A table whose sparse gradients, one for each time that rows are looked up, become one that is dense."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient


def _norm(name: str, h: Tensor) -> Tensor:
    """Each state in units of its own spread; scale and shift are learnt."""
    d = h.shape[-1]
    scale = pyro.param(f"{name}.scale", lambda: torch.ones(d))
    return F.layer_norm(h, (d,), scale, pyro.param(f"{name}.shift", lambda: torch.zeros(d)))


def _mean_where(value: Tensor, where: Tensor) -> Tensor:
    """Mean of each row's values (N, T) where asked for; 0 where nowhere."""
    return (value * where).sum(1) / where.sum(1).clamp(min=1)


def _heterogeneity(h: Tensor, visible: Tensor, temperature: float) -> Tensor:
    """How little the states h (N, T, D) of hidden tokens resemble any visible one's in particular: (N,) in 0..1."""
    unit = F.normalize(h, dim=-1)
    n_visible = visible.sum(1)
    z = (unit @ unit.mT / temperature).masked_fill(~visible[:, None], NOWHERE)  # (N, T, T)
    # entropy of softmax z = log sum exp z - sum p z
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)  # (N, T)
    mean = _mean_where(entropy, ~visible) / n_visible.clamp(min=2).log()
    return torch.where((n_visible > 1) & ~visible.all(1), mean, 1.0)


def _log_shares(codes: Tensor, at: Tensor, n_groups: int, n_levels: int) -> Tensor:
    """Log shares of the codes among those of each group of columns, (G, L)."""
    cells = (at * n_levels + codes).flatten()
    count = torch.bincount(cells, minlength=n_groups * n_levels).reshape(n_groups, n_levels)
    share = count / count.sum(1, keepdim=True)
    return share.clamp(min=RAREST / n_levels).log()
