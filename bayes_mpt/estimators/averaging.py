"""A factor model averaged over its posterior in place of its maximum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_mpt.estimators.fitted import Fitted
from bayes_mpt.estimators.integrals import sampled_evidence
from bayes_mpt.predictors.base import Frozen
from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.program.affine import DenseMap
from bayes_mpt.program.affine.maps import with_correlated_noise
from bayes_mpt.runtime.serial import one_thread

__all__ = ["averaged"]


def averaged(fitted: Fitted, rows: NDArray[np.floating]) -> Fitted:
    """The fit with the posterior mean of its Gaussian, N(E[mu], E[C]), in place of the maximum.

    E[C] = W W' + R with W = E[W] in the slice's gauge, so that R is the noise of the tokens, correlated where W is not
    known well. Rows are scored by this one Gaussian, which is the law of a new row to first order in the spread.
    """
    found = sampled_evidence(fitted, rows, seed=fitted.draws)
    shared = fitted.shared_map("average='posterior'")
    weight, mean = found.draws.mean_loadings, found.mean
    shift = 0.0 if fitted.shift is None else fitted.shift
    rest = torch.as_tensor(found.covariance - weight @ weight.T)
    wide = DenseMap(
        torch.as_tensor(mean - shift)[None],
        torch.as_tensor(weight.copy())[None],
        rest.diagonal()[None],
        shared.latent_loc[:1].double().cpu() * 0,
        torch.eye(weight.shape[1], dtype=torch.float64)[None],
        1.0,
        shared.value.double().cpu(),
    )
    wide = with_correlated_noise(wide, torch.linalg.cholesky(rest)[None])
    with torch.no_grad(), one_thread(rows.size), fitted.program((fitted.tensor(rows),)) as bound:
        like = shared.loc
        loc, loading, noise, latent_loc, root = (t.to(like) for t in wide[:5])
        reading = DenseMap(loc, loading, noise, latent_loc, root, 1.0, fitted.tensor(rows))
        read = LinearRows(bound.structure, reading)
        total = float(read.score().sum())
        fit = replace(fitted.fit, at_zero=[])
        return replace(fitted, bound=Frozen(bound, read), fit=fit, total=total, se=0.0, posterior=found)
