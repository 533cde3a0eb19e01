"""Labels of which some are seen (``obs_mask``): unknown ones summed out, seen ones tokens; against sums in scipy."""

from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import laplace, norm, poisson

from bayes_mpt import BayesMPT
from bayes_mpt.predictors.choice import choose
from bayes_mpt.program.store import OwnStore

PROBS, MEANS = np.array([0.2, 0.3, 0.5]), np.array([0.0, 2.0, 4.0])


def data(n=15):
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, n)
    x = MEANS[kind] + rng.normal(size=n)
    labels = kind.astype(float)
    labels[::3] = np.nan
    return x[:, None], labels


def summed(terms, labels):
    """Terms (N, 3) of each kind; of a seen label that of it alone."""
    seen = ~np.isnan(labels)
    out = logsumexp(terms, axis=1)
    out[seen] = terms[seen, labels[seen].astype(int)]
    return out


def kind_of(labels):
    prior = dist.Categorical(torch.tensor(PROBS))
    return pyro.sample("kind", prior, obs=labels.nan_to_num(), obs_mask=~labels.isnan()).long()


@pytest.mark.parametrize(("law", "truth"), [(dist.Normal, norm), (dist.Laplace, laplace)])
def test_unknown_labels_are_summed_out_and_seen_ones_count(law, truth):
    def program(x, labels):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law(torch.tensor(MEANS)[kind_of(labels)], 1.0), obs=x[:, 0])

    x, labels = data()
    terms = np.log(PROBS) + truth.logpdf(x, MEANS, 1.0)
    fitted = BayesMPT(program).fit(x, labels)
    assert fitted.score_samples(x, labels) == pytest.approx(summed(terms, labels), abs=1e-9)
    unknown = np.full(len(x), np.nan)
    assert fitted.score_samples(x, unknown) == pytest.approx(logsumexp(terms, axis=1), abs=1e-9)


def test_a_statement_about_a_label_that_is_partly_seen_is_none():
    """Of a mixture; labels are data besides, and the score is that of the program without its statement."""
    x, labels = data()

    class Stated:
        mixture_map: ClassVar = {"weights": "w", "loc": "m", "scale_tril": "root"}

        def __call__(self, x):
            w = pyro.param("w", torch.tensor(PROBS), dist.constraints.simplex)
            loc = pyro.param("m", torch.tensor(MEANS[:, None]))
            root = pyro.param("root", torch.eye(1, dtype=torch.float64), dist.constraints.lower_cholesky)
            known = torch.tensor(labels)
            with pyro.plate("rows", len(x)):
                prior = dist.Categorical(w)
                kind = pyro.sample("kind", prior, obs=known.nan_to_num(), obs_mask=~known.isnan()).long()
                pyro.sample("x", dist.MultivariateNormal(loc[kind], scale_tril=root), obs=x)

    terms = np.log(PROBS) + norm.logpdf(x, MEANS, 1.0)
    rows = (torch.tensor(x),)
    with OwnStore():
        score = choose(Stated(), rows).read(rows).score()
    assert score.detach().numpy() == pytest.approx(summed(terms, labels), abs=1e-9)


def test_labels_beside_gaussian_latents_of_the_row():
    def program(x, labels):
        with pyro.plate("rows", len(x)):
            kind = kind_of(labels)
            z = pyro.sample("z", dist.Normal(torch.tensor(MEANS)[kind], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    x, labels = data()
    terms = np.log(PROBS) + norm.logpdf(x, MEANS, np.sqrt(1.25))
    assert BayesMPT(program).fit(x, labels).score_samples(x, labels) == pytest.approx(
        summed(terms, labels), abs=1e-9
    )


def test_labels_beside_latents_that_take_nodes():
    def program(x, labels):
        with pyro.plate("rows", len(x)):
            kind = kind_of(labels)
            z = pyro.sample("z", dist.Normal(0.0, 0.5))
            pyro.sample("x", dist.Poisson((z + kind).exp()), obs=x[:, 0])

    x, labels = np.array([[0.0], [2.0], [5.0], [9.0]]), np.array([0.0, np.nan, 1.0, np.nan])

    def joint(z, count, kind):
        return norm.pdf(z, 0, 0.5) * poisson.pmf(count, np.exp(z + kind))

    terms = np.log(PROBS) + np.log(
        [[quad(joint, -5, 5, (count, kind), epsabs=1e-13)[0] for kind in range(3)] for count in x[:, 0]]
    )
    assert BayesMPT(program).fit(x, labels).score_samples(x, labels) == pytest.approx(
        summed(terms, labels), abs=1e-8
    )
