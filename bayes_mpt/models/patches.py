"""A masked autoencoder of images, with a likelihood: what the hidden pixels are, given the visible ones."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from bayes_mpt.models.checks import CheckedModel, IntegersFrom, OneOf, skipped_levels
from bayes_mpt.models.networks import check_heads, check_layers, codes_of, with_params

__all__ = ["MaskedPatches"]

LIKELIHOODS = ("bernoulli", "categorical", "gaussian")
MIN_SCALE = 1e-2  # of a Normal pixel in units of its spread, or the density of a constant one had no bound
SEEN = 0.3  # sd of what embeds a pixel; positions have one, or patches would be told apart late
SAID = 0.02  # and of what reads a pixel, so that the training starts at independent ones


class MaskedPatches(CheckedModel):
    """A small transformer whose tokens are the patches of an image (He et al. 2022), with a distribution of each pixel.

        h_p = position_p + embed(pixels of patch p where visible, else 0; which are visible)
        L times:  h += attention(norm h),  h += mlp(norm h);      out = read(norm h)

    A masked autoencoder's squared error is no density; here ``out``, added to what the column's first rows say, gives
    each pixel its own distribution, given everything visible. Any pixels may be hidden or missing; hidden ones are
    independent of each other given the visible ones, which is what `bayes_mpt.masks.Blocks` asks for, to hide whole
    patches: ``Blocks(UniformSize(64), program.patches)``. Parameters: "start" (T, O), and those of "network".

    Parameters
    ----------
    image_shape : (int, int) or (int, int, int)
        Height, width and, where there are any, channels, of which a row holds the T values in this order.
    patch : int or (int, int), default=4
        Height and width of a patch, of all channels; patches must tile the image.
    width : int, default=64
        Of the states, a multiple of ``n_heads``.
    n_layers : int, default=2
        Each of attention and of a network of one hidden layer of 4 ``width``, pre-norm.
    n_heads : int, default=4
        Of the attention.
    likelihood : {"bernoulli", "categorical", "gaussian"}, default="bernoulli"
        Of a pixel: 0 or 1 by its logit; a code 0, ..., L - 1 by L logits; Normal, of a mean and a scale that both
        depend on what is visible, the scale at least a hundredth of the column's standard deviation.
    n_levels : int, optional
        L of categorical pixels; by default the largest code of the first rows, and one.

    Examples
    --------
    >>> from bayes_mpt import BayesMPT
    >>> from bayes_mpt.training import Epochs
    >>> from bayes_mpt.masks import Blocks, PermutationChain, UniformSize
    >>> from sklearn.datasets import load_digits
    >>> X = (load_digits().data > 8).astype("float32")
    >>> program = MaskedPatches((8, 8), width=32, n_layers=1)
    >>> masks = Blocks(UniformSize(64), program.patches)
    >>> training = Epochs(max_epochs=6, learning_rate=1e-2, validation_fraction=0.0)
    >>> fitted = BayesMPT(program, masks=masks, training=training, random_state=0).fit(X[:1000])
    >>> found = fitted.estimate(X[1000:1100], masks=Blocks(PermutationChain(), program.patches))
    >>> bool(found.lml.mean() > -25)  # independent pixels: -25.5
    True
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    """Of rows and network."""
    batch_size: ClassVar[int] = 64
    """Rows a step of the training, unless another number is asked for."""
    learning_rate: ClassVar[float] = 1e-3
    """Of Adam, likewise."""
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "width": [IntegersFrom(1)],
        "n_layers": [IntegersFrom(1)],
        "n_heads": [IntegersFrom(1)],
        "likelihood": [OneOf(*LIKELIHOODS)],
        "n_levels": [IntegersFrom(1), None],
    }

    def __init__(
        self,
        image_shape: tuple[int, ...],
        patch: int | tuple[int, int] = 4,
        width: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        *,
        likelihood: Literal["bernoulli", "categorical", "gaussian"] = "bernoulli",
        n_levels: int | None = None,
    ):
        self.image_shape = image_shape
        self.patch = patch
        self.width = width
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.likelihood = likelihood
        self.n_levels = n_levels

    @property
    def patches(self) -> NDArray[np.int64]:
        """For each value of a row (T,) the number of its patch, for `bayes_mpt.masks.Blocks`.

        Examples
        --------
        >>> MaskedPatches((2, 4), patch=2).patches
        array([0, 0, 1, 1, 0, 0, 1, 1])
        """
        shape, patch = (np.ravel(a).tolist() for a in (self.image_shape, self.patch))
        patch = patch * 2 if len(patch) == 1 else patch
        for name, given in (("image_shape", shape), ("patch", patch)):
            if any(not isinstance(a, int) or isinstance(a, bool) or a < 1 for a in given):
                raise ValueError(f"{name} must hold integers of at least 1, got {getattr(self, name)!r}")
        if len(shape) not in (2, 3) or len(patch) != 2 or shape[0] % patch[0] or shape[1] % patch[1]:
            raise ValueError(
                "image_shape must be (height, width) or (height, width, channels), tiled by patches of (height, width)"
                f", got {self.image_shape!r} and {self.patch!r}"
            )
        height, width = patch
        row, column = np.arange(shape[0]) // height, np.arange(shape[1]) // width
        number = row[:, None] * (shape[1] // width) + column  # (H, W)
        return number.ravel().repeat(math.prod(shape[2:]))

    def __call__(self, x: Tensor, visible: Tensor) -> None:
        """Run the program on images x (N, T), of which (N, T) are visible; what x holds elsewhere is not looked at."""
        patch_of = torch.as_tensor(self._check(x), device=x.device)
        shown = torch.where(visible, x, 0.0)
        start = pyro.param("start", lambda: self._start(shown))  # (T, O)
        values = self._values(shown, start)  # (N, T, C)
        pixels = torch.cat([values * visible[..., None], visible[..., None].to(x)], -1)
        order = patch_of.argsort(stable=True)  # pixels, one patch after the other
        n_patches = int(patch_of.max()) + 1
        patches = pixels[:, order].reshape(len(x), n_patches, -1)
        kind = _Net(
            n_patches, patches.shape[2], start.numel() // n_patches, self.width, self.n_layers, self.n_heads
        )
        out = with_params("network", _skeleton(kind), lambda: _Transformer(kind), x)(patches)
        out = out.reshape(len(x), -1, start.shape[1])[:, order.argsort()]  # (N, T, O)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", self._distribution(start, out).to_event(1), obs=x)

    def _validate_params(self) -> None:
        super()._validate_params()
        check_heads(self.width, self.n_heads)
        _ = self.patches

    def advice(self, X: NDArray[np.floating]) -> list[str]:
        return skipped_levels(X) if self.likelihood == "categorical" and self.n_levels is None else []

    def _check(self, x: Tensor) -> NDArray[np.int64]:
        self._validate_params()
        check_layers(self.width, self.n_layers, x)
        patches = self.patches
        if len(patches) != x.shape[1]:
            raise ValueError(
                f"image_shape {tuple(self.image_shape)} holds {len(patches)} values, but rows {x.shape[1]}"
            )
        return patches

    def _start(self, shown: Tensor) -> Tensor:
        """What is said of each pixel before the network adds to it (T, O): its distribution in the first rows."""
        if self.likelihood == "gaussian":
            sd = shown.std(0) if len(shown) > 1 else torch.ones_like(shown[0])
            return torch.stack([shown.mean(0), torch.where(sd > 0, sd, 1.0).log()], -1)
        n_levels = 2 if self.likelihood == "bernoulli" else self.n_levels
        n_levels = max(1, int(shown.max()) + 1) if n_levels is None else n_levels
        codes = codes_of(shown, n_levels)
        count = torch.stack([(codes == level).sum(0) for level in range(n_levels)], -1)
        log_share = ((count + 1 / n_levels) / (len(shown) + 1)).log()  # no level is impossible
        return log_share.diff(dim=-1) if self.likelihood == "bernoulli" else log_share

    def _values(self, shown: Tensor, start: Tensor) -> Tensor:
        """What is embedded of visible pixels (N, T, C)."""
        if self.likelihood == "gaussian":
            return ((shown - start[:, 0]) / start[:, 1].exp())[..., None]
        n_levels = 2 if self.likelihood == "bernoulli" else start.shape[1]
        codes = codes_of(shown, n_levels)
        return one_hot(codes, n_levels)[..., 1:].to(shown)

    def _distribution(self, start: Tensor, out: Tensor) -> Any:
        """Of the pixels (N, T); their values are checked where they are scored, since nothing else sees hidden ones."""
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=(start + out)[..., 0], validate_args=True)
        if self.likelihood == "categorical":
            return dist.Categorical(logits=start + out, validate_args=True)
        unit = start[:, 1].exp()
        scale = MIN_SCALE + softplus(out[..., 1] + math.log(math.e - 1))  # about one at the start
        return dist.Normal(start[:, 0] + unit * out[..., 0], unit * scale)


class _Net(NamedTuple):
    """What the network is."""

    n_patches: int
    n_inputs: int
    n_outputs: int
    width: int
    n_layers: int
    n_heads: int


class _Transformer(nn.Module):
    """From patches (N, P, inputs) to (N, P, outputs), each looking at all."""

    def __init__(self, kind: _Net):
        super().__init__()
        d = kind.width
        self.embed = nn.Linear(kind.n_inputs, d)
        self.position = nn.Parameter(torch.randn(kind.n_patches, d))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    d, kind.n_heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(kind.n_layers)
            ),
            nn.LayerNorm(d),
        )
        self.read = nn.Linear(d, kind.n_outputs)
        nn.init.normal_(self.embed.weight, std=SEEN)
        nn.init.normal_(self.read.weight, std=SAID)
        nn.init.zeros_(self.read.bias)

    def forward(self, patches: Tensor) -> Tensor:
        return self.read(self.layers(self.embed(patches) + self.position))


@lru_cache(maxsize=64)
def _skeleton(kind: _Net) -> nn.Module:
    """The network without values."""
    with torch.device("meta"):
        return _Transformer(kind)
