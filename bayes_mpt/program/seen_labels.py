"""Partly observed discrete sites, ``pyro.sample("y", ..., obs=labels, obs_mask=seen)``, as a latent and its tokens.

Pyro makes two sites of it: ``y_observed``, and a masked latent ``y_unobserved``, so that what depends on y depends on
observed values in some rows and on a latent in others. Here y is one latent z of all rows, summed out, and a label that
is seen is a token given it, of probability one where it equals z:

    p(x, y) = sum_z p(z) [y = z] p(x | z)

So unknown labels are summed out, seen ones count, and any label can be hidden and predicted from x. It is assumed that
labels are missing at random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["with_seen_labels"]

SEEN, UNSEEN = "_observed", "_unobserved"


def with_seen_labels(model: Callable[..., Any]) -> Callable[..., Any]:
    """The program, with such sites as a latent and its tokens; other programs run as they are.

    Examples
    --------
    >>> import pyro
    >>> def program(y):
    ...     seen = ~y.isnan()
    ...     with pyro.plate("rows", len(y)):
    ...         pyro.sample("y", dist.Bernoulli(0.5), obs=y.nan_to_num(), obs_mask=seen)
    >>> trace = pyro.poutine.trace(with_seen_labels(program)).get_trace(torch.tensor([1.0, 0.0, torch.nan]))
    >>> [(name, node["is_observed"]) for name, node in trace.nodes.items() if name.startswith("y")]
    [('y_unobserved', False), ('y', True)]
    """

    def run(*args: Any) -> Any:
        with _SeenLabels():
            return model(*args)

    return run


class _SeenLabels(Messenger):
    """Inside of all other handlers of a run, which see the latent and its tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, Tensor, Tensor]] = {}
        """Prior of y, its labels and which are seen, by its name."""
        self.latent: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name.endswith(SEEN) and _is_partly_seen(msg):
            self.seen[name.removesuffix(SEEN)] = msg["fn"], msg["value"], msg["mask"]
            msg.update(name=name.removesuffix(SEEN) + UNSEEN, is_observed=False, value=None, mask=None)
        elif name.endswith(UNSEEN) and name.removesuffix(UNSEEN) in self.latent:
            msg.update(value=self.latent[name.removesuffix(UNSEEN)], done=True, stop=True)
        elif name in self.latent and msg["infer"].get("_deterministic"):
            prior, labels, seen = self.seen[name]
            z = self.latent[name]
            msg.update(fn=_same_as(z, prior), value=labels, mask=seen, is_observed=True)
            msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "_deterministic"}

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name.endswith(UNSEEN) and name.removesuffix(UNSEEN) in self.seen:
            self.latent.setdefault(name.removesuffix(UNSEEN), msg["value"])
        elif name in self.latent:  # a trace outside holds the label; the program goes on with the latent
            msg["value"] = self.latent[name]


def _is_partly_seen(msg: Any) -> bool:
    """Whether a site of such a name is the observed half of one with ``obs_mask``, and can be summed out."""
    known = isinstance(msg["fn"], dist.Categorical | dist.Bernoulli)
    return known and msg["is_observed"] and isinstance(msg["mask"], Tensor)


def _same_as(z: Tensor, prior: Any) -> Any:
    """The distribution of a label that equals z."""
    if isinstance(prior, dist.Bernoulli):
        return dist.Bernoulli(z)
    n_values = prior.param_shape[-1]
    return dist.Categorical(torch.nn.functional.one_hot(z.long(), n_values).to(torch.get_default_dtype()))
