"""Networks of torch as parts of a Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pyro
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["with_params"]


def with_params(
    name: str, net: nn.Module, fresh: Callable[[], nn.Module], like: Tensor
) -> Callable[[Tensor], Tensor]:
    """A network whose parameters are `pyro.param`s, so that it has no state of its own.

    Parameters
    ----------
    name : str
        In front of the names of its parameters.
    net : torch.nn.Module
        Whose values are not looked at: it may be on the device "meta".
    fresh : callable
        Gives the same network with initial values; called once, where there are no parameters yet.
    like : Tensor
        Whose dtype and device the parameters get.

    Examples
    --------
    >>> import torch
    >>> pyro.clear_param_store()
    >>> net, x = nn.Linear(3, 2), torch.ones(5, 3)
    >>> bool((with_params("net", net, lambda: net, x)(x) == net(x)).all()), sorted(pyro.get_param_store())
    (True, ['net.bias', 'net.weight'])
    """
    values = cache(lambda: dict(fresh().named_parameters()))
    params = {
        n: pyro.param(f"{name}.{n}", lambda n=n: values()[n].detach().clone().to(like))
        for n, _ in net.named_parameters()
    }
    return lambda x: functional_call(net, params, (x,))
