"""A transformer that predicts its own hidden tokens, and the contrastive loss with tied weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayes_mpt.models.checks import (
    CheckedModel,
    IntegersFrom,
    OneOf,
    check_memory,
    skipped_levels,
)
from bayes_mpt.models.networks import check_heads, check_layers, codes_of

__all__ = ["MaskedTransformer", "contrastive_loss"]

HEADS = ("softmax", "contrastive")
RAREST = 1e-2  # probability of a code at the start, shared by those that a column never shows
MAX_LEVELS = 2**15  # of a column that nothing was said of: more are no codes
PART = 2**25  # logits that are held at once
START = 0.02  # sd of embeddings and of what is added to the residual stream


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
    head : {"softmax", "contrastive"}, default="softmax"
        "contrastive": trained on negatives from the batch (arXiv 2309.08351), `contrastive_loss` over its hidden cells;
        read out as p(a) proportional to q(a) exp(e(a)' norm(h)), with q the frequency of the code over all hidden
        cells. A step then computes nothing for codes that are not in the batch: for vocabularies of thousands.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.training import Epochs
    >>> rng = np.random.default_rng(0)
    >>> X = (np.arange(6) + rng.integers(3, size=(300, 1))) % 3.0  # a cycle: one token tells the others
    >>> training = Epochs(max_epochs=30, learning_rate=0.01, validation_fraction=0.0)
    >>> fitted = BayesMPT(MaskedTransformer(16, 1, 2), training=training, random_state=0).fit(X)
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
        head: Literal["softmax", "contrastive"] = "softmax",
    ):
        self.width = width
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_levels = n_levels
        self.groups = groups
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
        tokens = F.embedding(group * most + codes, table, sparse=True)  # (N, T, D)
        with pyro.plate("rows", len(x)):
            h = _norm("norm", self.states(tokens, visible)[-1])
            bias = pyro.param(
                "unigram" if contrastive else "bias", lambda: _log_shares(codes, row, n_biases, most).to(x)
            )  # (G, L) or (T, L)
            said = _Codes(h, table, bias, group, n_levels, ~visible, contrastive)
            pyro.sample("x", said.to_event(1), obs=x)

    def states(self, tokens: Tensor, visible: Tensor) -> list[Tensor]:
        """States (N, T, D) of the tokens before the layers, without positions, and after each of them: n_layers + 1.

        For subclasses, as `attend` is: both run within the plate of rows, so that a penalty of one's own is a
        `pyro.factor` (N,) there, which trains and enters no score. Layers are kept by hand: those of
        `torch.nn.TransformerEncoderLayer` say the same (to 5e-15) but for biases in attention and output, which cannot
        be left out alone, and let no subclass into their attention.

        Parameters
        ----------
        tokens : Tensor of shape (N, T, D)
            Embedded tokens; in place of the hidden ones the mask token stands.
        visible : bool Tensor of shape (N, T)
            Which are shown.
        """
        n, n_tokens, d = tokens.shape
        heads = (n, n_tokens, self.n_heads, d // self.n_heads)
        h = torch.where(visible[..., None], tokens, _normal("mask", d))
        states = [h]
        h = h + _normal("position", n_tokens, d)
        for layer in range(self.n_layers):
            name = f"layer{layer}"
            qkv = F.linear(_norm(f"{name}.norm1", h), _normal(f"{name}.attend", 3 * d, d, sd=d**-0.5))
            q, k, v = (part.reshape(heads).transpose(1, 2) for part in qkv.chunk(3, -1))  # (N, H, T, D/H)
            found = self.attend(layer, q, k, v, visible).transpose(1, 2).reshape(n, n_tokens, d)
            h = h + F.linear(found, _normal(f"{name}.attended", d, d))
            up = F.linear(
                _norm(f"{name}.norm2", h),
                _normal(f"{name}.up", 4 * d, d, sd=d**-0.5),
                pyro.param(f"{name}.up_bias", lambda: torch.zeros(4 * d)),
            )
            h = h + F.linear(F.gelu(up), _normal(f"{name}.down", d, 4 * d))
            states.append(h)
        return states

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """What tokens find in this layer (N, H, T, D/H), from queries, keys and values of that shape; all to all."""
        return F.scaled_dot_product_attention(q, k, v)

    def _validate_params(self) -> None:
        super()._validate_params()
        check_heads(self.width, self.n_heads)

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


def _log_shares(codes: Tensor, at: Tensor, n_groups: int, n_levels: int) -> Tensor:
    """Log shares of the codes among those of each group of columns, (G, L)."""
    cells = (at * n_levels + codes).flatten()
    count = torch.bincount(cells, minlength=n_groups * n_levels).reshape(n_groups, n_levels)
    share = count / count.sum(1, keepdim=True)
    return share.clamp(min=RAREST / n_levels).log()
