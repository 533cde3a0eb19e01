"""Texts as token ids, and the copies of them that masks make."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bayes_mpt.masks import Masks

__all__ = ["Copies", "Text", "copies_of", "list_of", "token_ids"]


def list_of(texts: Any) -> Sequence[Any]:
    """Texts one by one; what is something else, but could be read as a list, is refused."""
    if isinstance(texts, Mapping | UserDict):  # whose keys would be taken for texts
        raise TypeError(
            f"texts must be a list of strings or of token ids, got {type(texts).__name__}: pass the texts themselves "
            '(what tokenizer(texts) gives holds token ids as its "input_ids")'
        )
    if isinstance(texts, pd.DataFrame):
        raise TypeError("texts must be a list of strings, got a DataFrame: pass the column that holds them")
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts must be a list of at least one, got {texts!r}")
    texts = texts if isinstance(texts, Tensor) else list(texts)
    if not len(texts):
        raise ValueError(f"texts must be a list of at least one, got {texts!r}")
    return texts


def token_ids(text: Any, i: int) -> Tensor:
    """Token ids (L,) of text number i, which is no string."""
    if isinstance(text, Mapping | UserDict):
        found = f"a {type(text).__name__}"
    elif isinstance(text, tuple | list) and any(isinstance(part, str) for part in text):
        found = f"{len(text)} strings: score each by itself, or join them to one"
    elif text is None or (isinstance(text, float) and math.isnan(text)) or text is pd.NA:
        found = f"{text!r}: leave missing texts out"
    else:
        try:
            ids = text.detach().cpu() if isinstance(text, Tensor) else torch.as_tensor(np.asarray(text))
        except (TypeError, ValueError):
            found = repr(text)
        else:
            if not ids.numel():
                ids = ids.long()
            whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
            if ids.ndim == 1 and whole:
                return ids.long()
            found = f"{ids.dtype} of shape {tuple(ids.shape)}".replace("torch.", "")
    raise ValueError(f"a text must be a string or token ids, text {i} is {found}")


class Text(NamedTuple):
    """One text, and which of its tokens are scored."""

    ids: Tensor
    """(L,) with special tokens."""
    own: Tensor
    """(T,) places of the tokens that are hidden and scored."""

    @property
    def n_tokens(self) -> int:
        return len(self.own)


class Copies(NamedTuple):
    """One text under several masks of one replicate."""

    text: int
    replicate: int
    hidden: Tensor
    """(S, T) bool."""
    weight: Tensor
    """(S, T), zero where a token is not scored."""


def copies_of(text: int, draw: int, masks: Masks) -> Iterable[Copies]:
    """A text under each mask of a draw, or each step of its chains."""
    if masks.visible is not None:
        return [Copies(text, draw, ~masks.visible, masks.weight)]
    assert masks.order is not None
    n_chains, n_tokens = masks.order.shape
    step = torch.arange(n_tokens)[:, None]
    # a token is hidden until its turn, and scored then
    return (
        Copies(text, draw * n_chains + c, place >= step, (place == step).double())
        for c, place in enumerate(masks.order.argsort(dim=1))
    )
