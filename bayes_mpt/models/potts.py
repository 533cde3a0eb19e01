"""Potts models of categorical sequences, and attention that factorises them (arXiv 2304.07235).

    log p(x) = sum_i h_i(x_i) + sum_{i<j} W_ij(x_i, x_j) - log Z,      L sites, C levels

`Potts` has these fields and couplings for parameters, `FactoredAttention` makes the couplings of attention between
positions times values of tokens. Both are programs ``model(x, visible)``: they say what each hidden token is, given the
visible ones. `Couplings` is the explicit joint density that either stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from bayes_mpt.models.checks import (
    CheckedModel,
    IntegersFrom,
    NumbersFrom,
    OneOf,
    check_memory,
    skipped_levels,
)
from bayes_mpt.models.couplings import Couplings
from bayes_mpt.models.networks import codes_of

__all__ = ["FactoredAttention", "Potts"]

MEAN_FIELD_SWEEPS = 12
START = 0.1  # sd of what must not start at zero, where two factors would both stay


class Potts(CheckedModel):
    """A Potts model as a program: what each hidden site is, given the visible ones.

    Rows are levels held as floats 0, ..., C - 1. Parameters "field" (L, C) and "coupling" (L, C, L, C), of which the
    part that is symmetric and couples different sites counts; or, separable, "sites" (L, L) and "levels" (C, C):
    W_iajb = J_ij U_ab. Trained on `bayes_mpt.masks.LeaveOneOut` this is maximum pseudo-likelihood (Besag): one hidden
    site needs no sum. Of more hidden sites each is summed over the others, exactly where these have few states, and by
    mean field where not.

    Parameters
    ----------
    separable : bool, default=False
        Couplings that are a product of one matrix between sites and one between levels.
    field : bool, default=True
        Whether there are fields.
    n_levels : int or "auto", default="auto"
        C; "auto" is the largest level of the first run plus one.
    max_states : int, default=4096
        States of the hidden sites of a row that are summed over exactly.
    prior_sd : float, default=1.0
        Of couplings, for ``BayesMPT(penalty=True)``.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.masks import LeaveOneOut
    >>> rng = np.random.default_rng(0)
    >>> first = rng.integers(3, size=(300, 1))
    >>> X = np.hstack([first, np.where(rng.random((300, 1)) < 0.8, first, rng.integers(3, size=(300, 1)))])
    >>> fitted = BayesMPT(Potts(), masks=LeaveOneOut()).fit(X.astype(float))
    >>> couplings = Potts().couplings(fitted.params_)
    >>> bool(couplings.contact_map(corrected=False)[0, 1] > 1)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "separable": ["boolean"],
        "field": ["boolean"],
        "n_levels": [IntegersFrom(1), OneOf("auto")],
        "max_states": [IntegersFrom(1)],
        "prior_sd": [NumbersFrom(positive=True)],
    }

    def __init__(
        self,
        separable: bool = False,
        field: bool = True,
        n_levels: int | Literal["auto"] = "auto",
        max_states: int = 4096,
        prior_sd: float = 1.0,
    ):
        self.separable = separable
        self.field = field
        self.n_levels = n_levels
        self.max_states = max_states
        self.prior_sd = prior_sd

    def __call__(self, x: Tensor, visible: Tensor) -> None:
        """Run the program on levels x (N, L), of which (N, L) are visible; what x holds elsewhere is not looked at."""
        self._validate_params()
        shown = torch.where(visible, x, 0.0)
        n_sites, n_levels = x.shape[1], _n_levels(self.n_levels, shown)
        if not self.separable:
            what = f"couplings of {n_sites} sites for n_levels={n_levels}"
            check_memory(what, (n_sites * n_levels) ** 2, x, "use separable=True, or fewer sites")
        codes = codes_of(shown, n_levels)
        params = {}
        if self.field:
            params["field"] = pyro.param("field", lambda: _log_frequencies(x, n_levels, visible))
        if self.separable:
            params["sites"] = pyro.param("sites", lambda: START * _normal(x, n_sites, n_sites))
            params["levels"] = pyro.param("levels", lambda: START * _normal(x, n_levels, n_levels))
        else:
            shape = (n_sites, n_levels, n_sites, n_levels)
            params["coupling"] = pyro.param("coupling", lambda: torch.zeros(shape))
        logits = _hidden_logits(self._form(params), codes, visible, self.max_states)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.n_levels == "auto" else []

    def couplings(self, params: Mapping[str, ArrayLike]) -> Couplings:
        """The density at these parameters (``BayesMPT.params_``), in the zero-sum gauge."""
        return self._form(_tensors(params)).zero_sum()

    def hyperprior(self, x: Tensor) -> dict[str, tuple[Any, Any]]:
        """Normal priors: couplings around zero, fields wide around those of independent sites."""
        return _priors(("sites", "levels", "coupling"), self.prior_sd, x, _n_levels(self.n_levels, x))

    def _form(self, params: Mapping[str, Tensor]) -> Couplings:
        if self.separable:
            sites, levels = (0.5 * (params[n] + params[n].mT) for n in ("sites", "levels"))
            w = (sites - torch.diag(sites.diagonal()))[:, None, :, None] * levels[:, None, :]
        else:
            w = params["coupling"]
            w = 0.5 * (w + w.permute(2, 3, 0, 1)) * _others(len(w)).to(w)[:, None, :, None]
        return Couplings(params["field"] if self.field else w.new_zeros(w.shape[:2]), w)


class FactoredAttention(CheckedModel):
    """Attention whose queries and keys look at positions and whose values look at tokens.

        logits_i = h_i + sum_heads sum_{j visible, j != i} A_ij V x_j,      x_j one-hot

    With one head that is a Potts model with separable couplings, A for J and V for U; with several a sum of such
    products, which is a low-rank form of the general couplings. Hidden tokens add nothing. Parameters "attention"
    (H, L, L), or "query" and "key" (H, L, d); "value" (H, C, C); "field" (L, C). Rows are levels held as floats.

    Parameters
    ----------
    n_heads : int, default=1
        H.
    head_size : int, optional
        d of queries and keys, A = query key' / sqrt(d) before the softmax; None leaves the L x L scores free.
    softmax : bool, default=True
        Attention is positive and sums to one over the other sites, as in a transformer. Without it one head holds
        couplings of both signs.
    field : bool, default=True
        Whether there is an h.
    n_levels : int or "auto", default="auto"
        C; "auto" is the largest level of the first run plus one.
    prior_sd : float, default=1.0
        Of values and scores, for ``BayesMPT(penalty=True)``.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_heads": [IntegersFrom(1)],
        "head_size": [IntegersFrom(1), None],
        "softmax": ["boolean"],
        "field": ["boolean"],
        "n_levels": [IntegersFrom(1), OneOf("auto")],
        "prior_sd": [NumbersFrom(positive=True)],
    }

    def __init__(
        self,
        n_heads: int = 1,
        head_size: int | None = None,
        softmax: bool = True,
        field: bool = True,
        n_levels: int | Literal["auto"] = "auto",
        prior_sd: float = 1.0,
    ):
        self.n_heads = n_heads
        self.head_size = head_size
        self.softmax = softmax
        self.field = field
        self.n_levels = n_levels
        self.prior_sd = prior_sd

    def __call__(self, x: Tensor, visible: Tensor) -> None:
        """Run the program on levels x (N, L), of which (N, L) are visible; what x holds elsewhere is not looked at."""
        self._validate_params()
        shown = torch.where(visible, x, 0.0)
        n_sites, n_levels, n_heads = x.shape[1], _n_levels(self.n_levels, shown), self.n_heads
        n_numbers = n_heads * (n_sites * (self.head_size or n_sites) + n_levels**2)
        what = f"heads for n_heads={n_heads}, head_size={self.head_size}, n_levels={n_levels}"
        check_memory(what, n_numbers, x, "use fewer or smaller ones")
        codes = codes_of(shown, n_levels)
        params = {}
        for name in ("attention",) if self.head_size is None else ("query", "key"):
            shape = (n_heads, n_sites, n_sites if self.head_size is None else self.head_size)
            sd = START if self.head_size is None else 1.0
            params[name] = pyro.param(name, lambda shape=shape, sd=sd: sd * _normal(x, *shape))
        params["value"] = pyro.param("value", lambda: START * _normal(x, n_heads, n_levels, n_levels))
        if self.field:
            params["field"] = pyro.param("field", lambda: _log_frequencies(x, n_levels, visible))
        tokens = one_hot(codes, n_levels) * visible[..., None].to(x)  # (N, L, C)
        attention, value = self._attention(params), params["value"]
        if n_heads < n_levels:
            # sum_h A_h (V_h x): (L, H L) times (H L, N C)
            v = torch.einsum("njb,hab->hjna", tokens, value).flatten(0, 1).flatten(1)
            logits = attention.transpose(0, 1).flatten(1) @ v
            logits = logits.reshape(n_sites, len(x), n_levels).transpose(0, 1)
        else:
            w = torch.einsum("hij,hab->jbia", attention, value).reshape(n_sites * n_levels, -1)
            logits = (tokens.flatten(1) @ w).reshape(tokens.shape)
        if self.field:
            logits = logits + params["field"]
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.n_levels == "auto" else []

    def couplings(self, params: Mapping[str, ArrayLike]) -> Couplings:
        """The Potts model of these parameters: W = sum_h A_h V_h made symmetric, in the zero-sum gauge."""
        p = _tensors(params)
        w = torch.einsum("hij,hab->iajb", self._attention(p), p["value"])
        field = p["field"] if self.field else w.new_zeros(w.shape[:2])
        # What of w is a field of one of two sites is that site's alone: so the gauge comes before the symmetry.
        field, w = Couplings(field, w).zero_sum()
        return Couplings(field, 0.5 * (w + w.permute(2, 3, 0, 1)))

    def hyperprior(self, x: Tensor) -> dict[str, tuple[Any, Any]]:
        """Normal priors: values and scores around zero, fields wide around those of independent sites."""
        names = ("attention", "query", "key", "value")
        return _priors(names, self.prior_sd, x, _n_levels(self.n_levels, x))

    def _attention(self, params: Mapping[str, Tensor]) -> Tensor:
        """(H, L, L), zero on the diagonal."""
        if self.head_size is None:
            scores = params["attention"]
        else:
            scores = params["query"] @ params["key"].mT / math.sqrt(self.head_size)
        others = _others(scores.shape[1]).to(scores.device)
        if self.softmax:
            return scores.masked_fill(~others, -torch.inf).softmax(-1)
        return scores * others


# ---------------------------------------------------------------------------------------------------- hidden sites


def _hidden_logits(form: Couplings, codes: Tensor, visible: Tensor, max_states: int) -> Tensor:
    """log p(x_i = a | x_visible) of hidden sites, up to a constant: (N, L, C)."""
    n_sites, n_levels = form.field.shape
    tokens = one_hot(codes, n_levels) * visible[..., None].to(form.field)
    w = form.coupling.reshape(n_sites * n_levels, -1)
    given = form.field + (tokens.flatten(1) @ w).reshape(tokens.shape)  # from what is visible
    n_hidden = (~visible).sum(1)
    if int(n_hidden.max()) <= 1:
        return given
    out = given.clone()
    few = (n_hidden > 1) & (n_levels ** n_hidden.double() <= max_states)
    many = (n_hidden > 1) & ~few
    if bool(few.any()):
        masks, group = visible[few].unique(dim=0, return_inverse=True)
        rows = few.nonzero()[:, 0]
        for k, mask in enumerate(masks):
            sites = (~mask).nonzero()[:, 0]
            part = rows[group == k]
            found = _summed(given[part][:, sites], form.coupling[sites][:, :, sites])
            out[part[:, None], sites] = found
    if bool(many.any()):
        out[many] = _mean_field(given[many], w, ~visible[many])
    return out


def _summed(field: Tensor, coupling: Tensor) -> Tensor:
    """Log-marginals (N, m, C) of m sites with fields (N, m, C), by their C^m joint states."""
    n, n_sites, n_levels = field.shape
    joint = field.new_zeros(n, 1)  # over the states of the first sites
    shape: list[int] = []
    for i in range(n_sites):
        term = joint.reshape(n, *shape, 1) + field[:, i].reshape(n, *[1] * i, n_levels)
        for j in range(i):
            term = term + coupling[j, :, i].reshape(*[1] * j, n_levels, *[1] * (i - j - 1), n_levels)
        joint = term
        shape.append(n_levels)
    marginals = [joint.reshape(n, n_levels**i, n_levels, -1).logsumexp((1, 3)) for i in range(n_sites)]
    return torch.stack(marginals, 1)


def _mean_field(given: Tensor, w: Tensor, hidden: Tensor) -> Tensor:
    """Logits (N, L, C) of hidden sites that see each other's probabilities; a few damped sweeps."""
    logits = given
    for _ in range(MEAN_FIELD_SWEEPS):
        q = logits.softmax(-1) * hidden[..., None]
        logits = 0.5 * (logits + given + (q.flatten(1) @ w).reshape(given.shape))
    return logits


# --------------------------------------------------------------------------------------------------------- sampling


def _n_levels(n_levels: Any, x: Tensor) -> int:
    """C: as given, of the parameter that is there, or of the rows; NaN in these is no level."""
    highest = int(x.nan_to_num(0.0).max())
    store = pyro.get_param_store()
    for name in ("value", "levels", "coupling"):
        if name in store:
            found = int(store[name].shape[-1])
            if highest >= found:
                raise ValueError(
                    f"x holds level {highest}, but the model has {found} of them, from 0: set n_levels to "
                    "the number of levels that there are"
                )
            return found
    return highest + 1 if n_levels == "auto" else int(n_levels)


def _log_frequencies(x: Tensor, n_levels: int, seen: Tensor | None = None) -> Tensor:
    """Fields (L, C) of independent sites, with one more row of all levels; of the cells that are seen."""
    seen = ~x.isnan() if seen is None else seen
    codes = codes_of(torch.where(seen, x, 0.0), n_levels)
    count = (one_hot(codes, n_levels) * seen[..., None]).sum(0).to(x)
    return ((count + 1 / n_levels) / (seen.sum(0)[:, None] + 1)).log()


def _priors(names: tuple[str, ...], sd: float, x: Tensor, n_levels: int) -> dict[str, tuple[Any, Any]]:
    wide = 10.0
    return {**{name: (0.0, sd) for name in names}, "field": (_log_frequencies(x, n_levels), wide)}


def _tensors(params: Mapping[str, ArrayLike]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in params.items()}


def _normal(x: Tensor, *shape: int) -> Tensor:
    """Draws where x is, the same wherever that is."""
    return torch.randn(shape, device="cpu").to(x)


def _others(n_sites: int) -> Tensor:
    return ~torch.eye(n_sites, dtype=torch.bool)
