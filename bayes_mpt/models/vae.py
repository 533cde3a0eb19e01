"""Variational autoencoders: a deep latent-variable program, and a guide that sees what is visible."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayes_mpt.models.checks import (
    CheckedModel,
    Instance,
    IntegersFrom,
    OneOf,
    Sequence,
    check_memory,
    skipped_levels,
)
from bayes_mpt.models.networks import with_params

__all__ = ["VAE"]

LIKELIHOODS = ("bernoulli", "gaussian", "categorical", "studentt")
MIN_SCALE = 1e-3  # of a latent in the guide, in units of the prior
DEGREES = 4.0  # of freedom of Student-t tokens
CHANNELS = 32  # of the first convolution
RAREST = 1e-2  # probability of a category at the start


class VAE(CheckedModel):
    """Deep latent-variable model (Kingma & Welling 2014): z ~ N(0, I), tokens independent given decoder(z).

    Sites "z" (N, K) and "x" (N, T). It has a guide of its own, `guide`, a Normal whose mean and scale come from a
    network that sees ``(x * visible, visible)``, so that any tokens of a row may be hidden. Parameters are those of the
    two networks ("decoder...", "encoder...") and "shift", to which the decoder's output is added, (T,) or of
    categorical tokens (T, L); for real-valued tokens also "spread" (T,), their unit, and "noise" (T,), the scale of
    what the decoder leaves, in that unit. Their starts are found from the first rows.

    Parameters
    ----------
    latent_dim : int, default=2
        K >= 1.
    likelihood : {"bernoulli", "gaussian", "categorical", "studentt"}, default="bernoulli"
        Of a token: 0 or 1 by its logit, Normal, a code 0, ..., L - 1 by its logits, Student-t (4 degrees of freedom).
    hidden : tuple of int, default=(200, 200)
        Widths of the layers of the default networks.
    image_shape : (int, int), optional
        Height and width, both divisible by 4: rows are images of one channel, and the default networks convolutional.
    encoder : torch.nn.Module, optional
        From what is visible, then 1 where visible (..., 2 T), to mean and scale (..., 2 K). Real-valued tokens come in
        their units; of categorical ones the first part is (..., T L), one-hot.
    decoder : torch.nn.Module, optional
        From (..., K) to (..., T), for categorical tokens (..., T L).
    n_levels : int, optional
        L of categorical tokens; by default the largest code of the first rows, and one.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> pyro.clear_param_store()
    >>> x = torch.as_tensor(load_digits().data > 8, dtype=torch.float32)
    >>> trace = pyro.poutine.trace(VAE(5, hidden=(32,))).get_trace(x)
    >>> trace.nodes["z"]["value"].shape, trace.nodes["x"]["fn"].event_shape
    (torch.Size([1797, 5]), torch.Size([64]))
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    """Of rows and networks."""
    batch_size: ClassVar[int] = 128
    """Rows a step of the training, unless another number is asked for."""
    learning_rate: ClassVar[float] = 3e-3
    """Of Adam, likewise."""
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "latent_dim": [IntegersFrom(1)],
        "likelihood": [OneOf(*LIKELIHOODS)],
        "hidden": [Sequence(IntegersFrom(1), "a tuple of integers of at least 1, such as (200, 200)")],
        "image_shape": [Sequence(IntegersFrom(1), "a tuple (height, width)", 2), None],
        "encoder": [Instance(nn.Module, "a torch.nn.Module"), None],
        "decoder": [Instance(nn.Module, "a torch.nn.Module"), None],
        "n_levels": [IntegersFrom(1), None],
    }

    def __init__(
        self,
        latent_dim: int = 2,
        likelihood: Literal["bernoulli", "gaussian", "categorical", "studentt"] = "bernoulli",
        *,
        hidden: tuple[int, ...] = (200, 200),
        image_shape: tuple[int, int] | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        n_levels: int | None = None,
    ):
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.hidden = hidden
        self.image_shape = image_shape
        self.encoder = encoder
        self.decoder = decoder
        self.n_levels = n_levels

    def __call__(self, x: Tensor) -> None:
        """Run the program on rows x (N, T)."""
        self._check(x)
        k, start = self.latent_dim, self._start(x)
        widths = (k, *reversed(self.hidden), start["shift"].numel())
        decode = _network("decoder", self.decoder, _Net(widths, self._image(), encodes=False), x)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            pyro.sample("x", self._tokens(decode(z), start, x).to_event(1), obs=x)

    def guide(self, x: Tensor, visible: Tensor) -> None:
        """The latents given the visible tokens (N, T) bool; what x holds elsewhere is not looked at."""
        self._check(x)
        start, shown = self._start(x), visible.to(x)
        if self.likelihood == "categorical":
            n_levels = start["shift"].shape[1]
            codes = nn.functional.one_hot(x.long().clamp(0, n_levels - 1), n_levels).to(x)
            seen = (codes * shown[..., None]).flatten(-2)
        elif self.likelihood == "bernoulli":
            seen = x * shown
        else:
            seen = (x - start["shift"]) / start["spread"] * shown
        inputs = torch.cat([seen, shown], -1)
        widths = (inputs.shape[-1], *self.hidden, 2 * self.latent_dim)
        encode = _network("encoder", self.encoder, _Net(widths, self._image(), encodes=True), x)
        loc, spread = encode(inputs).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            scale = MIN_SCALE + nn.functional.softplus(spread + math.log(math.e - 1))  # one at the start
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.likelihood == "categorical" and self.n_levels is None else []

    def _check(self, x: Tensor) -> None:
        self._validate_params()
        if self.image_shape is not None:
            height, width = self.image_shape
            if height * width != x.shape[-1] or height % 4 or width % 4:
                raise ValueError(
                    f"image_shape must be (height, width), both divisible by 4, with a pixel for each of the "
                    f"{x.shape[-1]} columns, got {self.image_shape}"
                )

    def _image(self) -> tuple[int, int] | None:
        return None if self.image_shape is None else (int(self.image_shape[0]), int(self.image_shape[1]))

    def _start(self, x: Tensor) -> dict[str, Tensor]:
        """Where tokens stand before the decoder moves them."""
        if self.likelihood == "bernoulli":
            return {"shift": pyro.param("shift", lambda: _logit(x.mean(0)))}
        if self.likelihood == "categorical":
            return {"shift": pyro.param("shift", lambda: _log_shares(x, self.n_levels))}
        return {
            "shift": pyro.param("shift", lambda: x.mean(0)),
            "spread": pyro.param("spread", lambda: _spread(x), constraints.positive),
        }

    def _tokens(self, out: Tensor, start: dict[str, Tensor], x: Tensor) -> Any:
        """Distribution of the tokens (..., T) from the decoder's output (..., T) or (..., T L)."""
        shift = start["shift"]
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=shift + out)
        if self.likelihood == "categorical":
            return dist.Categorical(logits=shift + out.unflatten(-1, shift.shape))
        loc = shift + start["spread"] * out
        noise = pyro.param("noise", lambda: torch.ones_like(x[0]), constraints.positive)
        if self.likelihood == "gaussian":
            return dist.Normal(loc, start["spread"] * noise)
        return dist.StudentT(DEGREES, loc, start["spread"] * noise)


def _logit(share: Tensor) -> Tensor:
    return share.clamp(RAREST, 1 - RAREST).logit()


def _log_shares(x: Tensor, n_levels: int | None) -> Tensor:
    """Log shares of the codes of each token, (T, L)."""
    codes = x.long()
    found = int(codes.max()) + 1
    n_levels = found if n_levels is None else n_levels
    if found > n_levels or bool((x != codes).any()) or bool((codes < 0).any()):
        raise ValueError(
            f"categorical tokens must be codes 0, ..., {n_levels - 1}, got {x.min()} to {x.max()}: another n_levels or "
            "likelihood may fit"
        )
    check_memory(f"codes for n_levels={n_levels}", x.shape[-1] * n_levels, x, "use fewer")
    return nn.functional.one_hot(codes, n_levels).to(x).mean(0).clamp(min=RAREST / n_levels).log()


def _spread(x: Tensor) -> Tensor:
    sd = x.std(0) if len(x) > 1 else torch.ones_like(x[0])
    return torch.where(sd > 0, sd, 1.0)


# ------------------------------------------------------------------------------------------------------- networks


class _Net(NamedTuple):
    """What a default network is."""

    widths: tuple[int, ...]
    image_shape: tuple[int, int] | None
    encodes: bool


def _network(name: str, given: nn.Module | None, kind: _Net, like: Tensor) -> Callable[[Tensor], Tensor]:
    if given is None:
        n_numbers = sum(a * b for a, b in pairwise(kind.widths))
        sizes = " -> ".join(map(str, kind.widths))
        check_memory(f"the {name}'s layers {sizes} (latent_dim, hidden)", n_numbers, like, "use smaller ones")
    net = _skeleton(kind) if given is None else given
    for part in net.modules():
        if isinstance(part, _BatchNorm):
            raise ValueError(f"the {name} holds {part}, which makes rows depend on each other: use LayerNorm")
    run = with_params(name, net, lambda: _build(kind) if given is None else given, like)
    return run if given is None else _checked(name, run, kind)


def _checked(name: str, run: Callable[[Tensor], Tensor], kind: _Net) -> Callable[[Tensor], Tensor]:
    """A network that the user gave, whose output must have its width."""
    n_in, n_out = kind.widths[0], kind.widths[-1]

    def checked(x: Tensor) -> Tensor:
        try:
            out = run(x)
        except RuntimeError as error:
            raise ValueError(
                f"VAE: the {name} must take (..., {n_in}) to (..., {n_out}), and fails on {tuple(x.shape)}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if out.shape != (*x.shape[:-1], n_out):
            raise ValueError(
                f"VAE: the {name} must take (..., {n_in}) to (..., {n_out}), and takes {tuple(x.shape)} to "
                f"{tuple(out.shape)}"
            )
        return out

    return checked


@lru_cache(maxsize=64)
def _skeleton(kind: _Net) -> nn.Module:
    """The network without values."""
    with torch.device("meta"):
        return _build(kind)


def _build(kind: _Net) -> nn.Module:
    if kind.image_shape is not None:
        conv = _ConvEncoder if kind.encodes else _ConvDecoder
        return conv(kind.widths, kind.image_shape)
    layers: list[nn.Module] = []
    for a, b in zip(kind.widths[:-1], kind.widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class _ConvEncoder(nn.Module):
    """Two strided convolutions over what is visible and where, then one layer."""

    def __init__(self, widths: tuple[int, ...], image_shape: tuple[int, int]):
        super().__init__()
        height, width = self.shape = image_shape
        self.first = nn.Conv2d(widths[0] // (height * width), CHANNELS, 4, stride=2, padding=1)
        self.second = nn.Conv2d(CHANNELS, 2 * CHANNELS, 4, stride=2, padding=1)
        n = 2 * CHANNELS * (height // 4) * (width // 4)
        self.last = nn.Sequential(nn.Linear(n, widths[1]), nn.SiLU(), nn.Linear(widths[1], widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., P T) to (..., 2 K): planes of one-hot categories first, the plane of what is visible last."""
        n_pixels = self.shape[0] * self.shape[1]
        values, shown = x.split([x.shape[-1] - n_pixels, n_pixels], -1)
        planes = torch.cat([values.unflatten(-1, (n_pixels, -1)), shown[..., None]], -1).movedim(-1, -2)
        images = planes.reshape(-1, planes.shape[-2], *self.shape)
        h = nn.functional.silu(self.second(nn.functional.silu(self.first(images))))
        return self.last(h.flatten(1)).reshape(*x.shape[:-1], -1)


class _ConvDecoder(nn.Module):
    """Two layers, then two strided transposed convolutions."""

    def __init__(self, widths: tuple[int, ...], image_shape: tuple[int, int]):
        super().__init__()
        self.small = (2 * CHANNELS, image_shape[0] // 4, image_shape[1] // 4)
        n_levels = widths[-1] // (image_shape[0] * image_shape[1])
        n = math.prod(self.small)
        self.first = nn.Sequential(
            nn.Linear(widths[0], widths[-2]), nn.SiLU(), nn.Linear(widths[-2], n), nn.SiLU()
        )
        self.second = nn.ConvTranspose2d(2 * CHANNELS, CHANNELS, 4, stride=2, padding=1)
        self.last = nn.ConvTranspose2d(CHANNELS, n_levels, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(..., K) to (..., T L)."""
        h = self.first(z).reshape(-1, *self.small)
        out = self.last(nn.functional.silu(self.second(h)))  # (B, L, H, W)
        return out.flatten(2).mT.reshape(*z.shape[:-1], -1)  # pixel after pixel, its levels together
