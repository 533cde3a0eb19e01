"""Linear regression with everything integrated."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular
from scipy.special import betaln, gammaln
from sklearn.utils import check_X_y
from torch import Tensor

from bayes_mpt.models.checks import CheckedModel, NumbersFrom, unmasked

__all__ = ["BayesianRegression"]


class BayesianRegression(CheckedModel):
    """Linear regression, conjugate prior: y = x w + e, e ~ N(0, v), w ~ N(0, s^2 v I), v ~ InvGamma(a, b).

    Sites "noise_variance" (), "weights" (P,) and "y" (N,); no parameters, so nothing is fitted. Rows of x are
    given, not modelled.

    Parameters
    ----------
    prior_scale : float, default=1.0
        s > 0: the weights' standard deviation, in units of that of the noise.
    noise_shape, noise_rate : float, default=1.0
        a > 0 and b > 0.
    fit_intercept : bool, default=True
        Append a column of ones to x; its weight, the last, has the same prior.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = BayesianRegression(prior_scale=10.0)
    >>> trace = pyro.poutine.trace(model).get_trace(torch.as_tensor(X), torch.as_tensor(y))
    >>> trace.nodes["weights"]["value"].shape
    torch.Size([11])
    >>> bool(model.log_evidence(X, y) > model.log_evidence(X[:, :2], y))
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "prior_scale": [NumbersFrom(positive=True)],
        "noise_shape": [NumbersFrom(positive=True)],
        "noise_rate": [NumbersFrom(positive=True)],
        "fit_intercept": ["boolean"],
    }

    def __init__(
        self,
        prior_scale: float = 1.0,
        noise_shape: float = 1.0,
        noise_rate: float = 1.0,
        fit_intercept: bool = True,
    ):
        self.prior_scale = prior_scale
        self.noise_shape = noise_shape
        self.noise_rate = noise_rate
        self.fit_intercept = fit_intercept

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Run the program on covariates x (N, P) and targets y (N,)."""
        prior_scale, shape, rate = self._prior()
        if y.shape[-1:] != x.shape[:1]:
            raise ValueError(
                f"y must have shape ({len(x)},), one number for each row of x, got {tuple(y.shape)}"
            )
        if self.fit_intercept:
            x = torch.cat([x, x.new_ones(len(x), 1)], -1)
        v = pyro.sample("noise_variance", dist.InverseGamma(x.new_tensor(shape), x.new_tensor(rate)))
        sd = v.sqrt()  # (), or (S, 1) at S values at once
        prior_sd = (prior_scale * sd)[..., None].expand(*sd.shape, x.shape[1])
        weights = pyro.sample("weights", dist.Normal(torch.zeros_like(prior_sd), prior_sd).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * weights).sum(-1), sd), obs=y)

    def log_evidence(self, X: ArrayLike, y: ArrayLike) -> float:
        """The log marginal likelihood of y given X, in nats: weights and noise variance integrated, exactly.

        Parameters
        ----------
        X : array-like of shape (N, P)
        y : array-like of shape (N,)

        Returns
        -------
        float
            The log density of y under Student's t with 2 a degrees of freedom and shape matrix
            (b / a) (I + s^2 X X').
        """
        prior_scale, a, b = self._prior()
        x, y = check_X_y(unmasked(X), unmasked(y), dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        x = prior_scale * (np.column_stack([x, np.ones(len(x))]) if self.fit_intercept else x)
        n_rows, n_weights = x.shape
        # C = I + s^2 X X';  q = y' C^-1 y. QR never squares X, and bears columns of any scale
        if n_weights < n_rows:
            # [sX y; I 0] = Q [R r; 0 t]: |C| = |I + s^2 X'X| = |R|^2, and q = min_w |y - sXw|^2 + |w|^2 = t^2
            above = np.column_stack([x, y])
            root = _upper(np.vstack([above, np.eye(n_weights, n_weights + 1)]))
            log_det = 2 * np.log(np.abs(np.diagonal(root)[:-1])).sum()
            q = float(root[-1, -1] ** 2)
        else:
            # [sX'; I] = Q R: C = R'R
            root = _upper(np.vstack([x.T, np.eye(n_rows)]))
            log_det = 2 * np.log(np.abs(np.diagonal(root))).sum()
            q = float(np.square(solve_triangular(root, y, trans="T")).sum())
        half = n_rows / 2
        # log p = lnG(a + N/2) - lnG(a) - N/2 ln(2 pi b) - 1/2 ln|C| - (a + N/2) ln(1 + q / 2b)
        log_gammas = gammaln(half) - betaln(a, half)  # lnG(a + N/2) - lnG(a), also where a is large
        return float(
            log_gammas - half * math.log(2 * math.pi * b) - log_det / 2 - (a + half) * math.log1p(q / (2 * b))
        )

    def _prior(self) -> tuple[float, float, float]:
        self._validate_params()
        return float(self.prior_scale), float(self.noise_shape), float(self.noise_rate)


def _upper(a: np.ndarray) -> np.ndarray:
    """R of a = Q R."""
    return np.asarray(np.linalg.qr(a, mode="r"))
