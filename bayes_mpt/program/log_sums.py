"""Sums over the values of discrete latents, one latent after another, in logarithms.

    log sum_z prod_f f(z, ..) = m + log sum_z exp(sum_f log f(z, ..) - m),    m the largest term

over the factors f that hold z. Pyro's own ring takes the maximum of each factor by itself, far above that of the
product where factors disagree, and cuts slopes off at 2^-52 of it. With the maximum of the product values and slopes,
which are probabilities of z, have all digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast, final

import torch
from pyro.ops.rings import Ring
from torch import Tensor

__all__ = ["LogSums"]

MAX_PRODUCT = (
    2**16
)  # numbers of a product of factors that is made whole; larger ones are products of matrices
AT_ONCE = 2**22  # of them, where they must be
LOST = (
    0.8  # power of the smallest number: sums below it, in units of each factor's maximum, may have lost terms
)


@final
class LogSums(Ring):
    """The ring in which `pyro.ops.contract.contract_to_tensor` sums over values and multiplies over plates.

    Parameters
    ----------
    dim_to_size : dict of str to int
        Sizes of the plates, by symbol.

    Examples
    --------
    >>> from pyro.ops import packed
    >>> prior = packed.pack(torch.tensor([0.0, -50.0]), {-1: "z"})
    >>> rows = packed.pack(torch.tensor([-60.0, 0.0]), {-1: "z"})
    >>> LogSums({}).sumproduct([prior, rows], "z")  # log(e^-60 + e^-50)
    tensor(-50.0000)
    """

    def __init__(self, dim_to_size: dict[str, int]):
        super().__init__()
        self._dim_to_size = dim_to_size

    def sumproduct(self, terms: list[Tensor], dims: Iterable[str]) -> Tensor:
        """The product of these terms, summed over ``dims``, those first that hold few others."""
        size = {d: n for t in terms for d, n in zip(_dims(t), t.shape, strict=True)}

        def cost(dim: str) -> int:
            return math.prod(size[d] for d in _all_dims(t for t in terms if dim in _dims(t)))

        costs = {d: cost(d) for d in sorted(set(dims) & size.keys())}
        while costs:
            dim = min(costs, key=costs.__getitem__)
            found = _summed([t for t in terms if dim in _dims(t)], dim, size)
            terms = [*(t for t in terms if dim not in _dims(t)), found]
            del costs[dim]
            costs |= {d: cost(d) for d in costs.keys() & set(_dims(found))}
        return _whole(terms, _all_dims(terms))

    def product(self, term: Tensor, ordinal: Iterable[str]) -> Tensor:
        """A term, multiplied over those of these plates that it has."""
        away = [i for i, d in enumerate(_dims(term)) if d in ordinal]
        return _named(term.sum(away), _without(_dims(term), ordinal)) if away else term

    def inv(self, term: Tensor) -> Tensor:
        """One over a term."""
        return _named(-term, _dims(term))


def _dims(term: Tensor) -> str:
    """The symbols of a term's axes."""
    return cast(str, term._pyro_dims)  # type: ignore[attr-defined]  # Pyro names packed axes so


def _named(term: Tensor, dims: str) -> Tensor:
    term._pyro_dims = dims  # type: ignore[attr-defined]
    return term


def _all_dims(terms: Iterable[Tensor]) -> str:
    return "".join(sorted(set("".join(map(_dims, terms)))))


def _without(dims: str, away: Iterable[str]) -> str:
    return "".join(d for d in dims if d not in away)


def _placed(term: Tensor, dims: str) -> Tensor:
    """A term with its axes among these, 1 where it has none."""
    own = _dims(term)
    if own == dims:
        return term
    order = [own.index(d) for d in dims if d in own]
    if order != sorted(order):
        term = term.permute(order)
    sizes = iter(term.shape)
    return term.reshape([next(sizes) if d in own else 1 for d in dims])


def _whole(terms: list[Tensor], dims: str) -> Tensor:
    """The product of terms along these axes."""
    total = _placed(terms[0], dims)
    for term in terms[1:]:
        total = total + _placed(term, dims)
    return _named(total, dims)


def _summed(terms: list[Tensor], dim: str, size: dict[str, int]) -> Tensor:
    """The product of terms that hold a latent, summed over its values."""
    dims = _all_dims(terms)
    n = math.prod(size[d] for d in dims)
    if n <= MAX_PRODUCT or len(terms) == 1 or len(terms := _merged(terms)) == 1:
        return _directly(terms, dim, dims)
    return _by_products(terms, dim, dims, n)


def _directly(terms: list[Tensor], dim: str, dims: str) -> Tensor:
    axis = dims.index(dim)
    total = _whole(terms, dims)
    out = total.logsumexp(axis)
    impossible = out.detach() == -math.inf
    if bool(impossible.any()):  # the slope of a maximum that is not there is no number
        total = torch.where(impossible.unsqueeze(axis), 0.0, total)
        out = torch.where(impossible, -math.inf, total.logsumexp(axis))
    return _named(out, _without(dims, dim))


def _merged(terms: list[Tensor]) -> list[Tensor]:
    """The same product of fewer terms: one whose axes another has is made part of that."""
    out: list[Tensor] = []
    for term in sorted(terms, key=lambda t: -t.ndim):
        i = next((i for i, other in enumerate(out) if set(_dims(term)) <= set(_dims(other))), None)
        if i is None:
            out.append(term)
        else:
            out[i] = _whole([out[i], term], _dims(out[i]))
    return out


def _by_products(terms: list[Tensor], dim: str, dims: str, n: int) -> Tensor:
    """By products of matrices, each in units of its own maxima; not where a sum is far below these."""
    rest = _without(dims, dim)
    letters = {d: chr(ord("a") + i) for i, d in enumerate(dims)}
    spelled = ["".join(letters[d] for d in names) for names in (*map(_dims, terms), rest)]
    equation = f"{','.join(spelled[:-1])}->{spelled[-1]}"
    shifts, factors = [], []
    for term in terms:
        axis = _dims(term).index(dim)
        most = term.detach().amax(axis, keepdim=True).nan_to_num(neginf=0.0)
        factors.append((term - most).exp())
        shifts.append(_named(most.squeeze(axis), _without(_dims(term), dim)))
    total = torch.einsum(equation, *factors)
    low = total.detach() < torch.finfo(total.dtype).tiny ** LOST
    if bool(low.any()):
        ways = torch.einsum(equation, *((t.detach() > -math.inf).to(total) for t in terms))
        if bool((low & (ways > 0)).any()):
            return _in_parts(terms, dim, dims, n)
        total = torch.where(low, 1.0, total)
    found = total.log() + _whole(shifts, rest)
    return _named(torch.where(low, -math.inf, found) if bool(low.any()) else found, rest)


def _in_parts(terms: list[Tensor], dim: str, dims: str, n: int) -> Tensor:
    """Directly, some of the values of the longest other axis at a time."""
    size = {d: m for t in terms for d, m in zip(_dims(t), t.shape, strict=True)}
    along = max(_without(dims, dim), key=size.__getitem__)
    step, parts = max(1, size[along] * AT_ONCE // n), []
    for start in range(0, size[along], step):
        some = [
            _named(t.narrow(_dims(t).index(along), start, min(step, size[along] - start)), _dims(t))
            if along in _dims(t)
            else t
            for t in terms
        ]
        parts.append(_directly(some, dim, dims))
    rest = _without(dims, dim)
    return _named(torch.cat(parts, rest.index(along)), rest)
