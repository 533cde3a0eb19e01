"""What to hide: mask policies.

A policy draws a weighted stack of masks. A mask says which of the T tokens of a row are visible; every hidden
token is then scored alone, given the same visible ones, and the weights turn the scores into an estimate of
log p(x):

    score(x) = sum_k sum_i weight[k, i] * log p(x_i | x_visible[k])

Policies know nothing of models. Whether the expectation of their score is the log marginal likelihood (LML) is
written on them: ``is_lml``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from torch import Tensor

__all__ = [
    "Blocks",
    "EverySize",
    "FixedRate",
    "LeaveOneOut",
    "Masks",
    "PermutationChain",
    "Policy",
    "RandomState",
    "UniformSize",
    "one_each",
    "require_lml",
    "torch_generator",
]

RandomState = int | torch.Generator | None


class Masks(NamedTuple):
    """One draw of masks, shared by all rows or (`one_each`) each row's own. ``visible`` or ``order`` is set."""

    visible: Tensor | None
    """(S, T) bool: the tokens that mask k leaves visible; (S, N, T) of each row."""
    order: Tensor | None
    """(C, T) long: chains. Token ``order[c, t]`` is scored given ``order[c, :t]``; never expanded into T masks."""
    weight: Tensor
    """As ``visible``, zero where that is; or (C, T) by token for chains. Float64."""


def torch_generator(random_state: RandomState) -> torch.Generator:
    """A CPU generator from a seed; a generator passes through, None gives a fresh one."""
    if isinstance(random_state, torch.Generator):
        return random_state
    generator = torch.Generator()
    if random_state is None:
        generator.seed()
    elif isinstance(random_state, Integral):
        generator.manual_seed(int(random_state))
    else:
        raise TypeError(
            f"random_state must be an int, a torch.Generator or None, got {type(random_state).__name__}"
        )
    return generator


class Policy(BaseEstimator, ABC):
    """A rule for drawing masks: abstract; subclasses give `draw`."""

    chains: ClassVar[bool] = False
    """Whether every draw is a chain, along which conditionals that telescope add up to the joint density."""
    is_lml: ClassVar[bool]
    """Whether the expected score over the policy's draws is log p(x)."""
    deterministic: ClassVar[bool]
    """Whether every draw is the same."""

    @property
    def of_blocks(self) -> Policy | None:
        """The policy that draws blocks of tokens, where these are hidden and shown together (`Blocks`)."""
        return None

    @property
    def any_order(self) -> bool:
        """Whether every draw is a chain in whatever order, so that one of a program's own serves as well."""
        return False

    @abstractmethod
    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        """Draw one replicate of the policy's masks.

        Parameters
        ----------
        n_tokens : int
            T, at least 1.
        random_state : int, torch.Generator or None
            Where the randomness comes from.

        Returns
        -------
        Masks
        """


class PermutationChain(Policy):
    """Tokens revealed one by one in a random order, each scored given those before it.

    The chain rule: with exact conditionals the score of a single chain is log p(x), without any noise.

    Parameters
    ----------
    n_chains : int, default=1
        C, the number of orders averaged over.
    groups : array-like of shape (T,), optional
        Labels. Tokens with one label stay together in every order (the cells of one image patch, say).

    Examples
    --------
    >>> PermutationChain(n_chains=2).draw(4, random_state=0).order.shape
    torch.Size([2, 4])
    """

    chains = True
    is_lml = True
    deterministic = False

    def __init__(self, n_chains: int = 1, groups: ArrayLike | None = None):
        self.n_chains = n_chains
        self.groups = groups

    @property
    def any_order(self) -> bool:
        return self.groups is None

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        n_chains = _count("n_chains", self.n_chains)
        _count("n_tokens", n_tokens)
        generator = torch_generator(random_state)
        key = torch.rand(n_chains, n_tokens, generator=generator, dtype=torch.float64)
        if self.groups is not None:
            label = _labels(self.groups, n_tokens)
            place = torch.rand(n_chains, int(label.max()) + 1, generator=generator).argsort(dim=1)
            key = key + place[:, label]  # the group decides first, the token's own draw inside the group
        weight = torch.full((n_chains, n_tokens), 1.0 / n_chains, dtype=torch.float64)
        return Masks(None, key.argsort(dim=1), weight)


class UniformSize(Policy):
    """Mask sizes m uniform on 1..T, hidden tokens scored with weight T/m (arXiv 2306.00520, Prop. 1).

    With several masks the sizes are stratified: one in each of ``n_masks`` equal strata of 1..T, which makes a
    replicate far less noisy than independent sizes.

    Parameters
    ----------
    n_masks : int, default=1
        S, the number of masks in one draw.

    Examples
    --------
    >>> UniformSize(n_masks=3).draw(5, random_state=0).visible.shape
    torch.Size([3, 5])
    """

    is_lml = True
    deterministic = False

    def __init__(self, n_masks: int = 1):
        self.n_masks = n_masks

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        n_masks = _count("n_masks", self.n_masks)
        _count("n_tokens", n_tokens)
        generator = torch_generator(random_state)
        # u_s uniform in stratum s, m_s = 1 + floor(T u_s): averaged over the strata, m is uniform on 1..T.
        u = (torch.arange(n_masks) + torch.rand(n_masks, generator=generator, dtype=torch.float64)) / n_masks
        size = (1 + (n_tokens * u).long()).clamp(max=n_tokens)
        return _stack(size, n_tokens, n_tokens / n_masks, generator)


class EverySize(Policy):
    """The sum over all sizes as the paper's algorithm takes it: ``n_masks`` masks of every size 1..T.

    Parameters
    ----------
    n_masks : int, default=1
        Masks of each size, so that one draw holds S = T * n_masks of them.

    Examples
    --------
    >>> EverySize().draw(3, random_state=0).visible.sum(1)
    tensor([2, 1, 0])
    """

    is_lml = True
    deterministic = False

    def __init__(self, n_masks: int = 1):
        self.n_masks = n_masks

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        n_masks = _count("n_masks", self.n_masks)
        _count("n_tokens", n_tokens)
        size = torch.arange(1, n_tokens + 1).repeat_interleave(n_masks)
        return _stack(size, n_tokens, 1.0 / n_masks, torch_generator(random_state))


class FixedRate(Policy):
    """The usual masked training: a fixed share of the tokens hidden, scaled by T/m. NOT the LML.

    Its expectation is T S(x; m) for the one size m = round(rate T), which leaves out all other sizes; the bias
    depends on the parameters (`bayes_mpt.score.fixed_rate_bias`).

    Parameters
    ----------
    rate : float, default=0.15
        Share of hidden tokens, in (0, 1]; at least one token is hidden.
    n_masks : int, default=1
        S, the number of masks in one draw.
    """

    is_lml = False
    deterministic = False

    def __init__(self, rate: float = 0.15, n_masks: int = 1):
        self.rate = rate
        self.n_masks = n_masks

    def size(self, n_tokens: int) -> int:
        """m, the hidden tokens of each mask."""
        _count("n_tokens", n_tokens)
        if not isinstance(self.rate, Real) or not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate!r}")
        return max(1, round(float(self.rate) * n_tokens))

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        n_masks = _count("n_masks", self.n_masks)
        size = torch.full((n_masks,), self.size(n_tokens))
        return _stack(size, n_tokens, n_tokens / n_masks, torch_generator(random_state))


class LeaveOneOut(Policy):
    """Each token hidden in turn: the pseudo-likelihood (Besag). NOT the LML.

    Examples
    --------
    >>> LeaveOneOut().draw(2).visible
    tensor([[False,  True],
            [ True, False]])
    """

    is_lml = False
    deterministic = True

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        _count("n_tokens", n_tokens)
        visible = ~torch.eye(n_tokens, dtype=torch.bool)
        return Masks(visible, None, (~visible).double())


class Blocks(Policy):
    """Another policy's masks, drawn over blocks of tokens that are hidden and shown together: patches of images, say.

    Hidden tokens are scored one by one all the same. With S(x; m) the mean over masks of m of the P blocks of (1/m)
    times the sum over the hidden tokens, all sizes together are

        sum_{m=1}^P S(x; m) = mean over orders of the blocks of  sum_b sum_{i in b} log p(x_i | x_blocks before b)

    NOT the LML where tokens of a block depend on each other beyond what is visible, as latents make them do. Where they
    are independent given what is visible, as a program ``model(x, visible)`` says
    (`bayes_mpt.predictors.SelfPredictive`), each order gives a density of rows, and a score of all sizes may be
    reported like that of single tokens.

    Parameters
    ----------
    masks : Policy
        To which a block is a token. A `PermutationChain` becomes P masks an order, so that each block counts once:
        where they are as different as an image's middle and border, far less noisy than masks of random sizes.
    groups : array-like of shape (T,)
        Labels. Tokens with one label are a block.

    Examples
    --------
    >>> Blocks(EverySize(), ["a", "b", "a"]).draw(3, random_state=1).visible
    tensor([[False,  True, False],
            [False, False, False]])
    """

    is_lml = False
    deterministic = False

    def __init__(self, masks: Policy, groups: ArrayLike):
        self.masks = masks
        self.groups = groups

    @property
    def of_blocks(self) -> Policy:
        return self.masks

    def draw(self, n_tokens: int, random_state: RandomState = None) -> Masks:
        _count("n_tokens", n_tokens)
        check_policy(self.masks)
        label = _labels(self.groups, n_tokens)  # (T,)
        n_blocks = int(label.max()) + 1
        visible, order, weight = self.masks.draw(n_blocks, random_state)
        if order is not None:
            # (C, P): every step is a mask, of which the block whose turn has come is scored
            turn, step = order.argsort(dim=1)[:, None], torch.arange(n_blocks)[:, None]
            visible = (turn < step).flatten(0, 1)  # (C P, P)
            weight = (weight[:, None] * (turn == step)).flatten(0, 1)
        assert visible is not None
        return Masks(visible[:, label], None, weight[:, label])


def one_each(masks: Masks, n_rows: int, random_state: RandomState = None) -> Masks:
    """Give every row one of the S masks, all masks to about as many rows: the same expectation at 1/S of the cost.

    Examples
    --------
    >>> one_each(UniformSize(n_masks=3).draw(5, random_state=0), 100, random_state=0).visible.shape
    torch.Size([1, 100, 5])
    """
    if masks.visible is None:
        raise ValueError("a chain cannot be split into masks: draw from UniformSize or EverySize")
    n_masks, generator = len(masks.visible), torch_generator(random_state)
    # (a random row + a random shift) mod S is uniform for every row, whatever N
    shift = torch.randint(n_masks, (1,), generator=generator)
    which = (torch.randperm(n_rows, generator=generator) + shift) % n_masks
    return Masks(masks.visible[which][None], None, n_masks * masks.weight[which][None])


def check_policy(masks: Any) -> None:
    """Refuse what is no mask policy."""
    if not isinstance(masks, Policy):
        raise TypeError(f"masks must be a mask policy such as UniformSize(20), got {masks!r}")


def require_lml(policy: Policy, what: str, *, independent: bool = False) -> None:
    """Refuse a policy whose expected score is not the LML where an LML is reported.

    Parameters
    ----------
    policy : Policy
        What is asked for.
    what : str
        That reports it.
    independent : bool, default=False
        Whether hidden tokens are independent of each other given the visible ones, so that `Blocks` may be hidden.

    Raises
    ------
    ValueError
        If ``policy.is_lml`` is False.
    """
    if policy.of_blocks is not None:
        require_lml(policy.of_blocks, what)
        if not independent:
            raise ValueError(
                f"{what} needs masks whose expected score is the log marginal likelihood (LML). Blocks are scored "
                "token by token, and the sum is a block's log-density only if its tokens are independent given what is "
                f"visible, as a program model(x, visible) says. Use {policy.of_blocks!r} itself, or "
                "PermutationChain(groups=...)"
            )
    elif not policy.is_lml:
        raise ValueError(
            f"{what} needs masks whose expected score is the log marginal likelihood (LML), got {policy!r}, whose "
            "expectation is something else: it leaves out mask sizes. Use PermutationChain, UniformSize or "
            "EverySize."
        )


def _labels(groups: ArrayLike, n_tokens: int) -> Tensor:
    """Number of each token's group (T,)."""
    if np.shape(groups) != (n_tokens,):
        raise ValueError(
            f"groups must hold one label a token: wanted shape ({n_tokens},), got {np.shape(groups)}"
        )
    return torch.from_numpy(np.unique(np.asarray(groups), return_inverse=True)[1])


def _stack(size: Tensor, n_tokens: int, scale: float, generator: torch.Generator) -> Masks:
    """Hide ``size[k]`` tokens chosen uniformly; each hidden token weighs scale / size[k]."""
    rank = torch.rand(len(size), n_tokens, generator=generator, dtype=torch.float64).argsort(dim=1)
    hidden = rank < size[:, None]
    return Masks(~hidden, None, hidden * (scale / size.double())[:, None])


def _count(name: str, value: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
