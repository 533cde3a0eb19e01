"""Where a mixture of complete rows starts."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture as Theirs

from bayes_mpt import BayesMPT
from bayes_mpt.models import GaussianMixture
from bayes_mpt.models.gaussians import Gaussians

IRIS = (load_iris().data - load_iris().data.mean(0)) / load_iris().data.std(0)


@pytest.mark.parametrize("kind", ["full", "tied", "diag"])
def test_a_fit_is_as_good_as_the_best_of_ten_of_scikit_learn(kind):
    """Theirs goes on under the prior, which their best has not seen."""
    k, rows, model = 4, torch.as_tensor(IRIS), GaussianMixture(4, kind)

    def value(params):
        p = {name: torch.as_tensor(each) for name, each in params.items()}
        scale = p["scale"] if kind == "diag" else p["scale_tril"].expand(k, -1, -1)
        return float(Gaussians(p["weights"], p["loc"], scale).log_prob(rows).sum() + model.penalty(rows)(p))

    theirs = Theirs(k, covariance_type=kind, n_init=10, tol=1e-6, max_iter=500, random_state=0).fit(IRIS)
    end = {"weights": theirs.weights_, "loc": theirs.means_}
    if kind == "diag":
        end["scale"] = np.sqrt(theirs.covariances_)
    else:
        end["scale_tril"] = np.linalg.cholesky(theirs.covariances_)
    start = {name: torch.as_tensor(each) for name, each in end.items()}
    best = model.maximize(rows, start, tol=1e-9, max_iter=60)  # so few steps leave no room for other starts
    assert value(BayesMPT(model, random_state=0).fit(IRIS).params_) > value(best) - 0.1
