"""After Pyro's tutorials on mixtures: Gaussian mixtures, Dirichlet processes, topics."""

from __future__ import annotations

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from scipy.special import betaln, gammaln, logsumexp
from scipy.stats import norm
from torch.distributions import constraints
from zoo.case import Array, Case

K = 2
STICKS = 3


def mixture_of_priors(data):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(K)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", K):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data[:, 0])


def mixture_of_parameters(data):
    weights = pyro.param("weights", torch.ones(K) / K, constraint=constraints.simplex)
    locs = pyro.param("locs", lambda: torch.tensor([1.0, 8.0]))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data[:, 0])


def mix_weights(beta):
    remaining = (1 - beta).cumprod(-1)
    return F.pad(beta, (0, 1), value=1) * F.pad(remaining, (1, 0), value=1)


def dirichlet_process_normal(data):
    with pyro.plate("beta_plate", STICKS - 1):
        beta = pyro.sample("beta", dist.Beta(1, 0.8))
    with pyro.plate("mu_plate", STICKS):
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(mix_weights(beta)))
        pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)


def dirichlet_process_poisson(data):
    with pyro.plate("beta_plate", 3):
        beta = pyro.sample("beta", dist.Beta(1, 0.9))
    with pyro.plate("lambda_plate", 4):
        rate = pyro.sample("lambda", dist.Gamma(3, 0.05))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(mix_weights(beta)))
        pyro.sample("obs", dist.Poisson(rate[z]), obs=data[:, 0])


WORDS = 3


def lda(documents):
    with pyro.plate("topics", K):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / K, 1.0))
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS) / WORDS))
    with pyro.plate("documents", len(documents)):
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", documents.shape[1]):
            word_topics = pyro.sample(
                "word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"}
            )
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=documents.T)


def five_points(rng: np.random.Generator) -> tuple[Array]:
    return (np.array([[0.0], [1.0], [10.0], [11.0], [12.0]]),)


def two_heaps(rng: np.random.Generator) -> tuple[Array]:
    which = rng.uniform(size=40) < 0.4
    return ((np.where(which, 0.0, 6.0) + rng.normal(size=40))[:, None],)


def points_of_the_plane(rng: np.random.Generator) -> tuple[Array]:
    centre = np.array([[0.0, 0.0], [3.0, -3.0]])
    return (centre[rng.integers(2, size=9)] + rng.normal(size=(9, 2)),)


def sunspots(rng: np.random.Generator) -> tuple[Array]:
    return (rng.poisson(np.array([20.0, 60.0, 110.0])[rng.integers(3, size=40)])[:, None].astype(float),)


def three_documents(rng: np.random.Generator) -> tuple[Array]:
    return (np.array([[0, 0, 1, 0], [2, 2, 2, 1], [0, 2, 0, 2]], dtype=float),)


def log_dirichlet_multinomial(counts: Array, alpha: Array) -> Array:
    """log int Dirichlet(p | alpha) prod_k p_k^counts_k, over the last axis."""
    total = gammaln(alpha.sum(-1)) - gammaln((alpha + counts).sum(-1))
    return total + (gammaln(alpha + counts) - gammaln(alpha)).sum(-1)


def priors_by_assignments(params, x):
    """All 2^5 assignments; weights and locations in closed form, the scale by a fine grid of its logarithm."""
    log_scale = np.linspace(-12, 14, 4001)
    terms = []
    for z in product(range(K), repeat=len(x)):
        counts = np.bincount(z, minlength=K)
        of_scale = np.zeros(len(log_scale))
        variance = np.exp(2 * log_scale)
        for k in range(K):
            mine = x[np.array(z) == k, 0]
            n = len(mine)
            # N(x; 0, s^2 I + 100 11') by its eigenvalues: s^2 + 100 n once, s^2 for the rest
            along, whole = (mine.sum() ** 2 / n, (mine**2).sum()) if n else (0.0, 0.0)
            if n:
                of_scale -= 0.5 * ((n - 1) * np.log(variance) + np.log(variance + 100 * n))
                of_scale -= 0.5 * ((whole - along) / variance + along / (variance + 100 * n))
        of_scale += -len(x) / 2 * np.log(2 * np.pi) + norm.logpdf(log_scale, 0, 2)
        whole = logsumexp(of_scale) + np.log(log_scale[1] - log_scale[0])
        terms.append(whole + log_dirichlet_multinomial(counts, np.full(K, 0.5)))
    return logsumexp(terms)


def of_two_components(params, x):
    return logsumexp(
        norm.logpdf(x, params["locs"], params["scale"]) + np.log(params["weights"]), axis=1
    ).sum()


def sticks_by_assignments(params, x):
    """All 3^9 assignments: sticks are Beta by counts, locations normal by rows."""
    z = np.array(list(product(range(STICKS), repeat=len(x))))
    one = (z[..., None] == np.arange(STICKS)).astype(float)  # (S, N, K)
    counts = one.sum(1)
    beyond = np.cumsum(counts[:, ::-1], 1)[:, ::-1] - counts  # rows of later sticks
    sticks = betaln(1 + counts, 0.8 + beyond)[:, :-1] - betaln(1, 0.8)
    total = np.einsum("snk,nd->skd", one, x)
    # log N(x; 0, I + 5 11') a dimension: -n/2 log 2 pi - 1/2 log(1 + 5 n) - 1/2 (sum x^2 - 5 (sum x)^2 / (1 + 5 n))
    wide = 1 + 5 * counts
    data = -np.log(wide).sum(1) + 2.5 * (total**2 / wide[..., None]).sum((1, 2))
    data += -0.5 * (x**2).sum() - x.size / 2 * np.log(2 * np.pi)
    return logsumexp(sticks.sum(1) + data)


def topics_by_assignments(params, documents):
    """All 2^12 topics of words; words and shares of topics in closed form, topic weights by quadrature.

    Gamma(1/2, 1) is half the square of a standard normal: Gauss-Hermite nodes of it.
    """
    d, w = documents.shape
    z = np.array(list(product(range(K), repeat=d * w))).reshape(-1, d, w)
    node = np.linspace(0.0005, 9.9995, 1000) + 0.0045
    log_weight = np.log(2 * (node[1] - node[0])) + norm.logpdf(node)
    first, second = np.meshgrid(node**2 / 2, node**2 / 2, indexing="ij")
    alpha = np.stack([first, second], -1)  # (A, A, K)
    log_w = log_weight[:, None] + log_weight
    words = 0.0
    for k in range(K):
        of_topic = np.stack([((z == k) & (documents == v)).sum((1, 2)) for v in range(WORDS)], -1)
        words = words + log_dirichlet_multinomial(of_topic.astype(float), np.full(WORDS, 1 / WORDS))
    share, of_share = np.unique((z == 0).sum(2), axis=0, return_inverse=True)
    log_share = [log_dirichlet_multinomial(np.array([n, w - n], float), alpha) for n in range(w + 1)]
    weighed = np.array([logsumexp(log_w + sum(log_share[n] for n in row)) for row in share])
    return logsumexp(words + weighed[of_share])


CASES = [
    Case(
        "mixture_of_priors",
        mixture_of_priors,
        five_points,
        priors_by_assignments,
        tolerance=1e-3,
        se=0.04,
        slow=True,
    ),
    Case("mixture_of_parameters", mixture_of_parameters, two_heaps, of_two_components),
    Case(
        "dirichlet_process_normal",
        dirichlet_process_normal,
        points_of_the_plane,
        sticks_by_assignments,
        slow=True,
    ),
    Case("dirichlet_process_poisson", dirichlet_process_poisson, sunspots, slow=True),
    Case(
        "lda",
        lda,
        three_documents,
        topics_by_assignments,
        slow=True,
    ),
]
