"""What the networks of the models share: torch modules as parts of a program, sizes, codes as inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayes_mpt.models.checks import check_memory

__all__ = ["check_heads", "check_layers", "codes_of", "with_params"]


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

    @cache
    def values() -> dict[str, nn.Parameter]:
        with torch.device("cpu"):  # the same draws wherever they go
            return dict(fresh().named_parameters())

    params = {
        n: pyro.param(f"{name}.{n}", lambda n=n: values()[n].detach().clone().to(like))
        for n, _ in net.named_parameters()
    }
    return lambda x: functional_call(net, params, (x,))


def check_heads(width: int, n_heads: int) -> None:
    """Refuse states that heads cannot share evenly."""
    if width % n_heads:
        raise ValueError(f"width must be a multiple of n_heads, got width={width}, n_heads={n_heads}")


def check_layers(width: int, n_layers: int, like: Tensor) -> None:
    """Refuse layers of a transformer that no memory holds, before they are made."""
    # attention 4 width^2, the network between layers 8 width^2
    check_memory(
        f"layers for width={width}, n_layers={n_layers}", 12 * width**2 * n_layers, like, "use fewer"
    )


def codes_of(shown: Tensor, n_levels: int | Tensor) -> Tensor:
    """Rows of codes as whole numbers (N, T), each below the number of levels, of all columns or of each (T,)."""
    codes = shown.long()
    bad = (codes < 0) | (codes >= n_levels) | (codes != shown)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        top = int(torch.as_tensor(n_levels).expand(shown.shape[1])[column]) - 1
        raise ValueError(
            f"column {column} must hold codes 0, ..., {top}, got {float(shown[row, column]):g}: another n_levels or "
            "likelihood may fit"
        )
    return codes
