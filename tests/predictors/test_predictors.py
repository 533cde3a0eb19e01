"""One battery for every predictor: each number against full enumeration, dense algebra or fine grids done here."""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.ops.stats import fit_generalized_pareto
from scipy import stats
from scipy.special import betaln, expit, gammaln, logsumexp, softmax
from sklearn.mixture import GaussianMixture

from bayes_mpt.diagnostics import pareto_k
from bayes_mpt.masks import EverySize, Masks, PermutationChain, UniformSize
from bayes_mpt.models import BayesianRegression
from bayes_mpt.predictors import (
    Exact,
    Importance,
    LinearGaussian,
    NearestNeighbors,
    Quadrature,
    SequentialMonteCarlo,
    choose,
)
from bayes_mpt.predictors.gaussian.linear import LinearRows
from bayes_mpt.predictors.nodes.rules import log_t
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.store import OwnStore

N_ROWS = 5
LOG_2PI = math.log(2 * math.pi)


# ----------------------------------------------------------------------------------------------------- the truth


class States:
    """log p of visible tokens as a sum over S states (or grid nodes), given which tokens are independent."""

    def __init__(self, log_w, log_p, means=None, latents=None):
        self.log_p = np.asarray(log_p)  # (S, N, T)
        self.log_w = np.broadcast_to(np.asarray(log_w, dtype=float).reshape(len(self.log_p), -1),
                                     self.log_p.shape[:2])  # fmt: skip
        self.means = means  # (S, N, T)
        self.latents = latents  # (S, K) or (S, N, K)

    def _log_terms(self, shown):
        return self.log_w + np.where(shown, self.log_p, 0.0).sum(-1)

    def log_z(self, shown):
        """(N, T) bool -> (N,)."""
        return logsumexp(self._log_terms(shown), axis=0)

    def expect(self, what, shown):
        """E[what | shown]: what (S, N, ...) or (S, 1, ...)."""
        return (softmax(self._log_terms(shown), axis=0)[..., None] * what).sum(0)

    def tokens(self, shown):
        return None if self.means is None else self.expect(self.means, shown)

    def latent_means(self, shown):
        if self.latents is None:
            return None
        return self.expect(self.latents if self.latents.ndim == 3 else self.latents[:, None], shown)


class Gaussians:
    """The same with Gaussian tokens in each state: log_w (S,), mean (S, T), cov (S, T, T).

    With one state, latents of zero mean may have covariances (K, T) with the tokens.
    """

    def __init__(self, x, log_w, mean, cov, latents=None):
        self.x, self.log_w, self.mean, self.cov = x, np.asarray(log_w), np.asarray(mean), np.asarray(cov)
        self.latents = latents

    def _log_terms(self, shown):
        out = np.empty((len(self.log_w), len(self.x)))
        for s, (w, mean, cov) in enumerate(zip(self.log_w, self.mean, self.cov, strict=True)):
            sd = np.sqrt(np.diag(cov))
            corr = cov / np.outer(sd, sd)
            for n, on in enumerate(shown):
                z = ((self.x[n] - mean) / sd)[on]
                root = np.linalg.cholesky(corr[np.ix_(on, on)])
                half = np.linalg.solve(root, z)
                log_det = 2 * (np.log(np.diag(root)).sum() + np.log(sd[on]).sum())
                out[s, n] = w - 0.5 * (half @ half + log_det + on.sum() * LOG_2PI)
        return out

    def log_z(self, shown):
        return logsumexp(self._log_terms(shown), axis=0)

    def tokens(self, shown):
        share = softmax(self._log_terms(shown), axis=0)
        out = np.zeros_like(self.x)
        for s, (mean, cov) in enumerate(zip(self.mean, self.cov, strict=True)):
            for n, on in enumerate(shown):
                gain = (
                    cov[:, on] @ np.linalg.pinv(cov[np.ix_(on, on)]) if on.any() else np.zeros((len(mean), 0))
                )
                out[n] += share[s, n] * (mean + gain @ (self.x[n] - mean)[on])
        return out

    def latent_means(self, shown):
        if self.latents is None:
            return None
        ((mean, cov),) = zip(self.mean, self.cov, strict=True)
        return np.array(
            [
                self.latents[:, on] @ np.linalg.solve(cov[np.ix_(on, on)], (row - mean)[on])
                for row, on in zip(self.x, shown, strict=True)
            ]
        )


class Case(NamedTuple):
    """A program, what it is called with, the rows to be scored, and the truth at parameters theta."""

    name: str
    program: Callable
    x: np.ndarray  # (N, T), NaN missing
    truth: Callable  # theta -> States or Gaussians
    theta: dict = {}  # noqa: RUF012  # real numbers in the parameter store
    args: tuple | None = None  # of arrays, where they are not (x,)
    predictor: object = "auto"
    tol: float = 1e-9
    exact: bool = True
    loose: float = 0.0
    """Of single conditionals, whose nodes stand where the visible tokens put them, not the hidden one."""
    marks: tuple = ()

    @property
    def n_tokens(self):
        return self.x.shape[1]

    @property
    def step_tol(self):
        return max(self.tol, self.loose)

    def tensors(self):
        return tuple(tensor(a) for a in (self.args or (self.x,)))

    def bound(self):
        """The program scored in its way; call inside a store."""
        return bound_of(self.program, self.tensors(), self.theta, predictor=self.predictor)

    def read(self):
        """The conditionals; call inside a store."""
        return self.bound().read(self.tensors())


def tensor(a):
    return torch.as_tensor(np.asarray(a, dtype=np.float64))


def bound_of(program, args, theta=None, **how):
    for name, value in (theta or {}).items():
        pyro.param(f"theta_{name}", tensor(value).clone())
    return choose(program, args, **how)


def begin(program, args, theta=None, **how):
    return bound_of(program, args, theta, **how).read(args)


def param(name):
    return pyro.param(f"theta_{name}")


def holes(x, seed=0, row=True, share=0.2):
    """NaN in some cells, in all of the last row, in none of the first."""
    x = np.array(x, dtype=float)
    lost = np.random.default_rng(seed).uniform(size=x.shape) < share
    lost[0] = False
    lost[-1] = row
    x[lost] = np.nan
    return x


def nan_safe(log_density, x, *parameters):
    """A scipy log-density (S, N, T), zero where x (N, T) is missing."""
    filled = np.where(np.isnan(x), 1.0, x)
    return np.where(np.isnan(x), 0.0, log_density(filled, *parameters))


# ------------------------------------------------------------------------------------------- cases: discrete latents


def rng_of(name):
    return np.random.default_rng(abs(hash_of(name)))


def hash_of(name):
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**32


def latent_class_bernoulli():
    rng = rng_of("bernoulli")
    x = holes(rng.integers(0, 2, (N_ROWS, 5)))
    theta = {"w": rng.normal(size=3), "p": rng.normal(size=(3, 5))}

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            pyro.sample("x", dist.Bernoulli(logits=param("p")[z]).to_event(1), obs=x)

    def truth(t):
        p = expit(t["p"])[:, None]
        log_w = t["w"] - logsumexp(t["w"])
        means = np.broadcast_to(p, (3, *x.shape))
        return States(log_w, nan_safe(stats.bernoulli.logpmf, x, p), means, np.eye(3))

    return Case("latent class, Bernoulli", program, x, truth, theta)


def latent_class_categorical():
    rng = rng_of("categorical")
    x = holes(rng.integers(0, 4, (N_ROWS, 4)))
    theta = {"w": rng.normal(size=2), "p": rng.normal(size=(2, 4, 4))}

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            pyro.sample("x", dist.Categorical(logits=param("p")[z]).to_event(1), obs=x)

    def truth(t):
        log_p = t["p"] - logsumexp(t["p"], axis=-1, keepdims=True)  # (S, T, L)
        code = np.where(np.isnan(x), 0, x).astype(int)
        table = np.stack([log_p[:, j, code[:, j]] for j in range(4)], -1)  # (S, N, T)
        return States(t["w"] - logsumexp(t["w"]), table, latents=np.eye(2))

    return Case("latent class, Categorical", program, x, truth, theta)


def two_latents():
    """The second depends on the first, tokens on both."""
    rng = rng_of("two")
    x = holes(rng.integers(0, 2, (N_ROWS, 4)))
    theta = {"a": rng.normal(size=2), "b": rng.normal(size=(2, 3)), "p": rng.normal(size=(2, 3, 4))}

    def program(x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=param("a")))
            b = pyro.sample("b", dist.Categorical(logits=param("b")[a]))
            pyro.sample("x", dist.Bernoulli(logits=param("p")[a, b]).to_event(1), obs=x)

    def truth(t):
        log_w = (t["a"] - logsumexp(t["a"]))[:, None] + t["b"] - logsumexp(t["b"], axis=1, keepdims=True)
        p = expit(t["p"]).reshape(6, 1, 4)
        latents = np.array([[*np.eye(2)[i], *np.eye(3)[j]] for i, j in product(range(2), range(3))])
        means = np.broadcast_to(p, (6, *x.shape))
        return States(log_w.ravel(), nan_safe(stats.bernoulli.logpmf, x, p), means, latents)

    return Case("two discrete latents", program, x, truth, theta)


def cell_latents(rows_dim):
    """A class for each row and a latent for each of its cells, in a nested tokens plate."""
    rng = rng_of("cells")
    x = holes(rng.integers(0, 2, (N_ROWS, 4)))
    theta = {"w": rng.normal(size=2), "q": rng.normal(size=(2, 4)), "p": rng.normal(size=2)}
    tokens_dim = -3 - rows_dim

    def program(x):
        n, t = x.shape
        rows, tokens = pyro.plate("rows", n, dim=rows_dim), pyro.plate("tokens", t, dim=tokens_dim)
        with rows:
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
        with rows, tokens:
            q = param("q").T if tokens_dim == -1 else param("q").T[..., None, :]  # (T, 2) or (T, 1, 2)
            c = pyro.sample("c", dist.Bernoulli(logits=torch.where(z == 1, q[..., 1], q[..., 0])))
            p = param("p")
            obs = x if rows_dim == -2 else x.T
            pyro.sample("x", dist.Bernoulli(logits=p[0] + p[1] * c), obs=obs)

    def truth(t):
        q = expit(t["q"])[:, None]  # (S, 1, T)
        p = (1 - q) * expit(t["p"][0]) + q * expit(t["p"].sum())
        means = np.broadcast_to(p, (2, *x.shape))
        return States(t["w"] - logsumexp(t["w"]), nan_safe(stats.bernoulli.logpmf, x, p), means, np.eye(2))

    return Case(f"a latent per cell, rows plate {rows_dim}", program, x, truth, theta)


def rows_right():
    """Rows plate at dim -1, tokens plate at dim -2, as many tokens as rows."""
    rng = rng_of("right")
    x = holes(rng.poisson(3, (N_ROWS, N_ROWS)))
    theta = {"w": rng.normal(size=2), "r": rng.normal(size=(N_ROWS, 2))}

    def program(x):
        rows, tokens = pyro.plate("rows", len(x), dim=-1), pyro.plate("tokens", x.shape[1], dim=-2)
        with rows:
            z = pyro.sample("z", dist.Bernoulli(logits=param("w")[1] - param("w")[0]))
        with tokens, rows:
            rate = torch.where(z == 1, param("r")[:, 1:], param("r")[:, :1]).exp()  # (..., T, N)
            pyro.sample("x", dist.Poisson(rate), obs=x.T)

    def truth(t):
        rate = np.exp(t["r"].T)[:, None]
        means = np.broadcast_to(rate, (2, *x.shape))
        return States(t["w"] - logsumexp(t["w"]), nan_safe(stats.poisson.logpmf, x, rate), means, np.eye(2))

    return Case("rows plate right of the tokens plate", program, x, truth, theta)


def shared_class():
    """One class for all rows: they are one vector."""
    rng = rng_of("shared")
    table = holes(rng.integers(0, 2, (4, 2)), row=False)
    x = table.reshape(1, -1)
    theta = {"w": rng.normal(size=2), "p": rng.normal(size=(2, 2))}

    def program(x):
        z = pyro.sample("z", dist.Categorical(logits=param("w")))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=param("p")[z]).to_event(1), obs=x)

    def truth(t):
        p = np.tile(expit(t["p"]), (1, 4))[:, None]  # (S, 1, 8)
        return States(t["w"] - logsumexp(t["w"]), nan_safe(stats.bernoulli.logpmf, x, p), p, np.eye(2))

    return Case("a class that all rows share", program, x, truth, theta, args=(table,))


def no_latent():
    rng = rng_of("none")
    x = holes(rng.poisson(2, (N_ROWS, 3)))
    theta = {"r": rng.normal(size=3)}

    def program(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(param("r").exp()).to_event(1), obs=x)

    def truth(t):
        rate = np.exp(t["r"])[None, None]
        return States([0.0], nan_safe(stats.poisson.logpmf, x, rate), np.broadcast_to(rate, (1, *x.shape)))

    return Case("no latent", program, x, truth, theta)


def hmm(tokens, n_steps=5, n_states=3, n_rows=N_ROWS):
    """z_t given z_(t-1), a site for each step; truth by summing over all paths (or `forward`)."""
    rng = rng_of("hmm" + tokens)
    theta = {"start": rng.normal(size=n_states), "move": rng.normal(size=(n_states, n_states)),
             "emit": 2 * rng.normal(size=n_states)}  # fmt: skip
    normal = tokens == "Normal"
    raw = 2 * rng.normal(size=(n_rows, n_steps)) if normal else rng.integers(0, 2, (n_rows, n_steps))
    x = holes(raw)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                logits = param("start") if z is None else param("move")[z]
                z = pyro.sample(f"z{t}", dist.Categorical(logits=logits))
                e = param("emit")[z]
                pyro.sample(f"x{t}", dist.Normal(e, 0.8) if normal else dist.Bernoulli(logits=e), obs=x[:, t])

    def emissions(t):
        if normal:
            return nan_safe(stats.norm.logpdf, x[None], t["emit"][:, None, None], 0.8)
        return nan_safe(stats.bernoulli.logpmf, x[None], expit(t["emit"])[:, None, None])

    def truth(t):
        start = t["start"] - logsumexp(t["start"])
        move = t["move"] - logsumexp(t["move"], axis=1, keepdims=True)
        paths = np.array(list(product(range(n_states), repeat=n_steps)))  # (S, T)
        log_w = start[paths[:, 0]] + move[paths[:, :-1], paths[:, 1:]].sum(1)
        table = emissions(t)  # (states, N, T)
        log_p = np.stack([table[paths[:, j], :, j] for j in range(n_steps)], -1)
        e = t["emit"] if normal else expit(t["emit"])
        means = np.broadcast_to(e[paths][:, None], log_p.shape)
        latents = np.eye(n_states)[paths].reshape(len(paths), -1)
        return States(log_w, log_p, means, latents)

    def forward(t, shown):
        move = t["move"] - logsumexp(t["move"], axis=1, keepdims=True)
        table = np.where(shown, emissions(t), 0.0)  # (states, N, T)
        alpha = (t["start"] - logsumexp(t["start"]))[:, None] + table[..., 0]
        for j in range(1, n_steps):
            alpha = logsumexp(alpha[:, None] + move[..., None], axis=0) + table[..., j]
        return logsumexp(alpha, axis=0)

    return Case(f"hidden Markov, {tokens}", program, x, truth, theta), forward


def several_sites():
    rng = rng_of("several")
    n = N_ROWS
    parts = [
        rng.normal(size=(n, 2)),
        rng.poisson(3, (n, 1)),
        rng.integers(0, 2, (n, 2)),
        rng.integers(0, 3, (n, 1)),
    ]
    args = tuple(holes(p, seed) for seed, p in enumerate(parts))
    x = np.concatenate(args, 1)
    theta = {"w": rng.normal(size=2), "m": rng.normal(size=(2, 2)), "r": rng.normal(size=2),
             "b": rng.normal(size=(2, 2)), "c": rng.normal(size=(2, 3))}  # fmt: skip

    def program(a, k, b, c):
        with pyro.plate("rows", len(a)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            pyro.sample("a", dist.Normal(param("m")[z], 0.7).to_event(1), obs=a)
            pyro.sample("k", dist.Poisson(param("r")[z].exp()), obs=k[:, 0])
            pyro.sample("b", dist.Bernoulli(logits=param("b")[z]).to_event(1), obs=b)
            pyro.sample("c", dist.Categorical(logits=param("c")[z]), obs=c[:, 0])

    def truth(t):
        log_c = t["c"] - logsumexp(t["c"], axis=1, keepdims=True)
        code = np.where(np.isnan(args[3]), 0, args[3]).astype(int)
        log_p = np.concatenate(
            [
                nan_safe(stats.norm.logpdf, args[0], t["m"][:, None], 0.7),
                nan_safe(stats.poisson.logpmf, args[1], np.exp(t["r"])[:, None, None]),
                nan_safe(stats.bernoulli.logpmf, args[2], expit(t["b"])[:, None]),
                log_c[:, code[:, 0], None],
            ],
            -1,
        )
        return States(t["w"] - logsumexp(t["w"]), log_p, latents=np.eye(2))

    return Case("several sites of different types", program, x, truth, theta, args=args)


# name -> (pyro distribution of two parameters (2, T), scipy log-density of the same, draws, whether the mean is known)
CUTS = np.array([-1.0, 0.3, 1.5])


def ordered(x, a, b):
    low = np.concatenate([[-np.inf], CUTS])[x.astype(int)]
    high = np.concatenate([CUTS, [np.inf]])[x.astype(int)]
    return np.log(expit(high - a) - expit(low - a))


TOKENS = {
    "Normal": (
        lambda a, b: dist.Normal(a, b.exp()),
        lambda x, a, b: stats.norm.logpdf(x, a, np.exp(b)),
        lambda g, s: g.normal(size=s),
        lambda a, b: a,
    ),
    "StudentT": (
        lambda a, b: dist.StudentT(3.5, a, b.exp()),
        lambda x, a, b: stats.t.logpdf(x, 3.5, a, np.exp(b)),
        lambda g, s: g.standard_t(3.5, s),
        lambda a, b: a,
    ),
    "Laplace": (
        lambda a, b: dist.Laplace(a, b.exp()),
        lambda x, a, b: stats.laplace.logpdf(x, a, np.exp(b)),
        lambda g, s: g.laplace(size=s),
        lambda a, b: a,
    ),
    "LogNormal": (
        lambda a, b: dist.LogNormal(a, b.exp()),
        lambda x, a, b: stats.lognorm.logpdf(x, np.exp(b), scale=np.exp(a)),
        lambda g, s: g.lognormal(size=s),
        lambda a, b: np.exp(a + np.exp(2 * b) / 2),
    ),
    "Bernoulli": (
        lambda a, b: dist.Bernoulli(logits=a),
        lambda x, a, b: stats.bernoulli.logpmf(x, expit(a)),
        lambda g, s: g.integers(0, 2, s),
        lambda a, b: expit(a),
    ),
    "Binomial": (
        lambda a, b: dist.Binomial(10, logits=a),
        lambda x, a, b: stats.binom.logpmf(x, 10, expit(a)),
        lambda g, s: g.binomial(10, 0.4, s),
        lambda a, b: 10 * expit(a),
    ),
    "Poisson": (
        lambda a, b: dist.Poisson(a.exp()),
        lambda x, a, b: stats.poisson.logpmf(x, np.exp(a)),
        lambda g, s: g.poisson(2, s),
        lambda a, b: np.exp(a),
    ),
    "NegativeBinomial": (
        lambda a, b: dist.NegativeBinomial(b.exp(), logits=a),
        lambda x, a, b: stats.nbinom.logpmf(x, np.exp(b), expit(-a)),
        lambda g, s: g.poisson(2, s),
        lambda a, b: np.exp(b + a),
    ),
    "OrderedLogistic": (
        lambda a, b: dist.OrderedLogistic(a, tensor(CUTS)),
        ordered,
        lambda g, s: g.integers(0, 4, s),
        None,
    ),
    "Gamma": (
        lambda a, b: dist.Gamma(a.exp(), b.exp()),
        lambda x, a, b: stats.gamma.logpdf(x, np.exp(a), scale=np.exp(-b)),
        lambda g, s: g.gamma(2.0, size=s),
        lambda a, b: np.exp(a - b),
    ),
    "Beta": (
        lambda a, b: dist.Beta(a.exp(), b.exp()),
        lambda x, a, b: stats.beta.logpdf(x, np.exp(a), np.exp(b)),
        lambda g, s: g.beta(2.0, 3.0, s),
        lambda a, b: np.exp(a) / (np.exp(a) + np.exp(b)),
    ),
}


def tokens_of(kind):
    make, log_density, draw, mean = TOKENS[kind]
    rng = rng_of(kind)
    x = holes(draw(rng, (N_ROWS, 3)))
    fill = np.where(np.isnan(x), np.nanmedian(x[:-1]) if kind != "OrderedLogistic" else 1, x)
    theta = {"w": rng.normal(size=2), "a": rng.normal(size=(2, 3)), "b": 0.3 * rng.normal(size=(2, 3))}
    if kind in ("Bernoulli", "Binomial", "Poisson", "OrderedLogistic"):
        del theta["b"]  # one parameter

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            b = param("b")[z] if "b" in theta else None
            pyro.sample("x", make(param("a")[z], b).to_event(1), obs=x)

    def truth(t):
        a, b = t["a"][:, None], t["b"][:, None] if "b" in t else None
        log_p = np.where(np.isnan(x), 0.0, log_density(fill, a, b))
        means = None if mean is None else np.broadcast_to(mean(a, b), log_p.shape)
        return States(t["w"] - logsumexp(t["w"]), log_p, means, np.eye(2))

    return Case(f"tokens: {kind}", program, x, truth, theta)


def multinomial():
    """A token of several numbers beside one of a single number."""
    rng = rng_of("multinomial")
    counts = rng.multinomial(6, [0.2, 0.3, 0.5], N_ROWS).astype(float)
    k = rng.poisson(2, (N_ROWS, 1)).astype(float)
    theta = {"w": rng.normal(size=2), "p": rng.normal(size=(2, 3)), "r": rng.normal(size=2)}

    def program(counts, k):
        with pyro.plate("rows", len(counts)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            pyro.sample("counts", dist.Multinomial(6, logits=param("p")[z]), obs=counts)
            pyro.sample("k", dist.Poisson(param("r")[z].exp()), obs=k[:, 0])

    def truth(t):
        p = softmax(t["p"], axis=1)
        first = gammaln(7) - gammaln(counts + 1).sum(-1) + np.einsum("nl,sl->sn", counts, np.log(p))
        second = stats.poisson.logpmf(k[:, 0], np.exp(t["r"])[:, None])
        return States(t["w"] - logsumexp(t["w"]), np.stack([first, second], -1), latents=np.eye(2))

    x = np.column_stack([counts.sum(1), k])
    return Case("a Multinomial token", program, x, truth, theta, args=(counts, k))


# ------------------------------------------------------------------------------------- cases: Gaussian given discrete


def gaussian_mixture(kind, n_tokens=3):
    rng = rng_of("mixture" + kind)
    x = holes(2 * rng.normal(size=(N_ROWS, n_tokens)))
    theta = {"w": rng.normal(size=2), "m": rng.normal(size=(2, n_tokens)),
             "l": rng.normal(size=(2, n_tokens, n_tokens) if kind == "full" else (2, n_tokens))}  # fmt: skip
    eye = np.eye(n_tokens)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            if kind == "full":
                root = param("l").tril(-1) + torch.diag_embed(param("l").diagonal(dim1=-2, dim2=-1).exp())
                pyro.sample("x", dist.MultivariateNormal(param("m")[z], scale_tril=root[z]), obs=x)
            else:
                pyro.sample("x", dist.Normal(param("m")[z], param("l")[z].exp()).to_event(1), obs=x)

    def truth(t):
        if kind == "full":
            root = np.tril(t["l"], -1) + eye * np.exp(t["l"])
        else:
            root = eye * np.exp(t["l"])[:, None]
        return Gaussians(x, t["w"] - logsumexp(t["w"]), t["m"], root @ root.transpose(0, 2, 1))

    return Case(f"Gaussian mixture, {kind}", program, x, truth, theta)


def factor_analysers():
    rng = rng_of("analysers")
    x = holes(2 * rng.normal(size=(N_ROWS, 4)))
    theta = {
        "w": rng.normal(size=3),
        "m": rng.normal(size=(3, 4)),
        "f": rng.normal(size=(3, 4, 2)),
        "s": rng.normal(size=4),
    }

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            u = pyro.sample("u", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            mean = param("m")[z] + (param("f")[z] @ u[..., None])[..., 0]
            pyro.sample("x", dist.Normal(mean, param("s").exp()).to_event(1), obs=x)

    def truth(t):
        cov = t["f"] @ t["f"].transpose(0, 2, 1) + np.diag(np.exp(2 * t["s"]))
        return Gaussians(x, t["w"] - logsumexp(t["w"]), t["m"], cov)

    return Case("mixture of factor analysers", program, x, truth, theta)


def two_switches():
    """Two discrete latents, the second given the first, and a Normal latent whose spread they choose."""
    rng = rng_of("switches")
    x = holes(2 * rng.normal(size=(N_ROWS, 3)))
    theta = {
        "a": rng.normal(size=1),
        "b": rng.normal(size=2),
        "m": rng.normal(size=(2, 3)),
        "f": rng.normal(size=3),
    }

    def program(x):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=param("a")[0]))
            b = pyro.sample("b", dist.Bernoulli(logits=param("b")[a.long()]))
            u = pyro.sample("u", dist.Normal(b, 0.5 + a))
            mean = param("m")[a.long()] + u[..., None] * param("f")
            pyro.sample("x", dist.Normal(mean, 0.6).to_event(1), obs=x)

    def truth(t):
        log_w, mean, cov = [], [], []
        for a, b in product(range(2), range(2)):
            p, q = expit(t["a"][0]), expit(t["b"][a])
            log_w.append(math.log(p if a else 1 - p) + math.log(q if b else 1 - q))
            mean.append(t["m"][a] + b * t["f"])
            cov.append((0.5 + a) ** 2 * np.outer(t["f"], t["f"]) + 0.36 * np.eye(3))
        return Gaussians(x, log_w, mean, cov)

    return Case("two discrete latents and a Normal one", program, x, truth, theta)


def correlated(scale, latent, rho=0.999):
    """A MultivariateNormal token site, nearly singular, in any unit; with Normal latents too."""
    rng = rng_of("correlated")
    t = 4
    cov = scale**2 * (rho * np.ones((t, t)) + (1 - rho) * np.eye(t))
    root = np.linalg.cholesky(cov)
    x = holes(rng.normal(size=(N_ROWS, t)) @ root.T)
    theta = {"m": scale * rng.normal(size=t)}
    if latent:
        theta["f"] = scale * rng.normal(size=(t, 2))

    def program(x):
        with pyro.plate("rows", len(x)):
            mean = param("m")
            if latent:
                mean = mean + pyro.sample("u", dist.Normal(x.new_zeros(2), 1.0).to_event(1)) @ param("f").T
            pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=tensor(root)), obs=x)

    def truth(t):
        total = cov + t["f"] @ t["f"].T if latent else cov
        return Gaussians(x, [0.0], t["m"][None], total[None])

    name = f"MultivariateNormal tokens, unit {scale:g}" + (", Normal latents" if latent else "")
    return Case(name, program, x, truth, theta, tol=1e-8)


# ------------------------------------------------------------------------------------------------ cases: quadrature


def grid(width, reach, n):
    """Trapezoid nodes (S, width) of a standard normal, and log weights with the density."""
    one = np.linspace(-reach, reach, n)
    nodes = np.array(list(product(one, repeat=width))) if width > 1 else one[:, None]
    log_w = stats.norm.logpdf(nodes).sum(1) + width * math.log(one[1] - one[0])
    return nodes, log_w


GRIDS = {1: (10, 2001), 2: (8.5, 171), 3: (7.5, 46)}


def normal_latents(kind, width, predictor=None, tol=1e-7, loose=0.0):
    rng = rng_of(f"quadrature {kind} {width}")
    n_rows, t = (4, 4) if width == 1 else (3, 3)
    draw = {"Poisson": lambda s: rng.poisson(3, s), "Bernoulli": lambda s: rng.integers(0, 2, s),
            "StudentT": lambda s: 2 * rng.standard_t(4, s)}[kind]  # fmt: skip
    x = holes(draw((n_rows, t)))
    theta = {"m": 0.5 * rng.normal(size=t), "f": 0.7 * rng.normal(size=(t, width))}

    def program(x):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(width), 1.0).to_event(1))
            eta = param("m") + u @ param("f").T
            site = {
                "Poisson": lambda: dist.Poisson(eta.exp()),
                "Bernoulli": lambda: dist.Bernoulli(logits=eta),
                "StudentT": lambda: dist.StudentT(4.0, eta, 1.5),
            }[kind]()
            pyro.sample("x", site.to_event(1), obs=x)

    def truth(th):
        nodes, log_w = grid(width, *GRIDS[width])
        eta = (th["m"] + nodes @ th["f"].T)[:, None]  # (S, 1, T)
        filled = np.where(np.isnan(x), 0.0, x)
        if kind == "Poisson":
            log_p = filled * eta - np.exp(eta) - gammaln(filled + 1)
        elif kind == "Bernoulli":
            log_p = filled * eta - np.logaddexp(0, eta)
        else:
            log_p = stats.t.logpdf(filled, 4.0, eta, 1.5)
        mean = {"Poisson": np.exp, "Bernoulli": expit, "StudentT": lambda e: e}[kind](eta)
        return States(log_w, np.where(np.isnan(x), 0.0, log_p), mean, nodes)

    return Case(f"{kind} tokens, {width} Normal latents", program, x, truth, theta,
                predictor=predictor or Quadrature(), tol=tol, exact=False, loose=loose)  # fmt: skip


def positive_latent():
    """A Gamma precision for each row: tokens are multivariate Student t."""
    rng = rng_of("positive")
    x = holes(2 * rng.standard_t(3, (N_ROWS, 3)))
    theta = {"m": rng.normal(size=3), "a": np.array(0.8)}

    def program(x):
        with pyro.plate("rows", len(x)):
            tau = pyro.sample("tau", dist.Gamma(param("a").exp(), 2.0))
            pyro.sample("x", dist.Normal(param("m"), tau.rsqrt()[..., None]).to_event(1), obs=x)

    def truth(t):
        v = np.linspace(-30, 6, 4001)  # log precision
        log_w = stats.gamma.logpdf(np.exp(v), np.exp(t["a"]), scale=0.5) + v + math.log(v[1] - v[0])
        log_p = nan_safe(stats.norm.logpdf, x, t["m"], np.exp(-v / 2)[:, None, None])
        means = np.broadcast_to(t["m"], (1, *x.shape))
        return States(log_w, log_p, means, np.exp(v)[:, None])

    return Case(
        "a positive latent a row", program, x, truth, theta, predictor=Quadrature(), tol=1e-6, exact=False
    )


def discrete_in_quadrature():
    rng = rng_of("inside")
    x = holes(rng.poisson(3, (N_ROWS, 4)))
    theta = {"w": rng.normal(size=2), "m": 1 + 0.3 * rng.normal(size=(2, 4)), "f": 0.5 * rng.normal(size=4)}

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("w")))
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(
                "x", dist.Poisson((param("m")[z] + u[..., None] * param("f")).exp()).to_event(1), obs=x
            )

    def truth(t):
        nodes, log_w = grid(1, *GRIDS[1])
        eta = (t["m"][:, None] + nodes * t["f"]).reshape(-1, 1, 4)
        log_w = ((t["w"] - logsumexp(t["w"]))[:, None] + log_w).ravel()
        latents = np.array([[node[0], *np.eye(2)[z]] for z in range(2) for node in nodes])
        return States(log_w, nan_safe(stats.poisson.logpmf, x, np.exp(eta)), np.exp(eta), latents)

    return Case("a discrete latent inside quadrature", program, x, truth, theta,
                predictor=Quadrature(), tol=1e-6, exact=False)  # fmt: skip


# ------------------------------------------------------------------------------------------- cases: one Gaussian each


def linear_map(side):
    """Factor analysis with a latent that depends on another; the plate of rows on either side of the columns'."""
    rng = rng_of("map")
    x = holes(2 * rng.normal(size=(N_ROWS, 4)))
    theta = {
        "m": rng.normal(size=4),
        "w": rng.normal(size=(4, 2)),
        "s": 0.3 * rng.normal(size=4),
        "a": np.array(0.7),
    }

    def program(x):
        n, t = x.shape
        if side == "event":
            with pyro.plate("rows", n):
                u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
                v = pyro.sample("v", dist.Normal(param("a") * u, 0.5))
                mean = param("m") + torch.stack([u, v], -1) @ param("w").mT
                pyro.sample("x", dist.Normal(mean, param("s").exp()).to_event(1), obs=x)
            return
        with pyro.plate("rows", n, dim=-2):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            v = pyro.sample("v", dist.Normal(param("a") * u, 0.5))
            with pyro.plate("columns", t, dim=-1):
                mean = param("m") + u * param("w")[:, 0] + v * param("w")[:, 1]
                pyro.sample("x", dist.Normal(mean, param("s").exp()), obs=x)

    def truth(t):
        prior = np.array([[1.0, t["a"]], [t["a"], t["a"] ** 2 + 0.25]])
        cov = t["w"] @ prior @ t["w"].T + np.diag(np.exp(2 * t["s"]))
        return Gaussians(x, [0.0], t["m"][None], cov[None], prior @ t["w"].T)

    return Case(f"a linear map, columns by {side}", program, x, truth, theta)


def walk(by_row):
    """A random walk with noise: one series with gaps, or one for each row."""
    length = 18
    rng = rng_of("walk")
    x = holes(np.cumsum(rng.normal(size=(4 if by_row else 1, length)), 1), row=by_row)
    if not by_row:
        x[0, [3, 4, 9]] = np.nan
    theta = {"q": np.array(-0.3), "r": np.array(0.2)}

    def series(x):
        z = x.new_zeros(())
        for t in pyro.markov(range(length)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, param("q").exp()))
            pyro.sample(f"x_{t}", dist.Normal(z, param("r").exp()), obs=x[..., t])

    def rows(x):
        with pyro.plate("rows", len(x)):
            z = x.new_zeros(len(x))
            for t in pyro.markov(range(length)):
                z = pyro.sample(f"z_{t}", dist.Normal(z, param("q").exp()))
                pyro.sample(f"x_{t}", dist.Normal(z, param("r").exp()), obs=x[:, t])

    def truth(t):
        step = np.arange(length)
        latent = np.exp(2 * t["q"]) * (1 + np.minimum(step, step[:, None]))
        cov = latent + np.exp(2 * t["r"]) * np.eye(length)
        return Gaussians(x, [0.0], np.zeros((1, length)), cov[None], latent)

    args = None if by_row else (x[0],)
    return Case(
        "walks, one a row" if by_row else "a walk", rows if by_row else series, x, truth, theta, args=args
    )


def gaussian_vector(predictor):
    """Observations that are one Gaussian vector over rows with inputs; with all neighbours an exact one."""
    n = 9
    rng = rng_of("vector")
    inputs = np.sort(rng.uniform(size=(n, 1)), 0)
    y = rng.normal(size=n)
    y[[2, 7]] = np.nan
    theta = {"m": np.array(0.3), "l": np.array(-1.0), "s": np.array(-0.7)}

    def program(x, y):
        cov = torch.exp(-0.5 * (torch.cdist(x, x) / param("l").exp()) ** 2)
        cov = cov + param("s").exp() * torch.eye(x.shape[-2], dtype=x.dtype)
        pyro.sample("y", dist.MultivariateNormal(param("m") * torch.ones_like(y), cov), obs=y)

    def truth(t):
        gap = (inputs - inputs.T) / np.exp(t["l"])
        cov = np.exp(-0.5 * gap**2) + np.exp(t["s"]) * np.eye(n)
        return Gaussians(y[None], [0.0], np.full((1, n), t["m"]), cov[None])

    name = "one Gaussian vector" if predictor == "auto" else "one Gaussian vector by neighbours"
    return Case(name, program, y[None], truth, theta, args=(inputs, y), predictor=predictor)


class BetaBernoulli(NamedTuple):
    """Closed form: all rows share a Beta latent."""

    x: np.ndarray
    a: float
    b: float

    def log_z(self, shown):
        seen = self.x[shown]
        return np.array([betaln(self.a + seen.sum(), self.b + (1 - seen).sum()) - betaln(self.a, self.b)])

    def latent_means(self, shown):
        seen = self.x[shown]
        return np.array([[(self.a + seen.sum()) / (self.a + self.b + len(seen))]])

    def tokens(self, shown):
        return np.broadcast_to(self.latent_means(shown), self.x.shape)


def beta_bernoulli(predictor, a=2.0, b=3.0, tol=1e-6):
    rng = rng_of("coin")
    x = holes(rng.integers(0, 2, (8, 1)), row=False)
    theta = {"a": np.log(a), "b": np.log(b)}

    def program(x):
        p = pyro.sample("p", dist.Beta(param("a").exp(), param("b").exp()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    def truth(t):
        return BetaBernoulli(x.T, np.exp(t["a"]), np.exp(t["b"]))

    name = "a Beta latent that all rows share"
    return Case(name, program, x.T, truth, theta, args=(x[:, 0],), predictor=predictor, tol=tol, exact=False)


EXACT = [
    latent_class_bernoulli(),
    latent_class_categorical(),
    two_latents(),
    cell_latents(-2),
    cell_latents(-1),
    rows_right(),
    shared_class(),
    no_latent(),
    hmm("Bernoulli")[0],
    hmm("Normal")[0],
    several_sites(),
    *(tokens_of(kind) for kind in TOKENS),
    multinomial(),
    gaussian_mixture("diag"),
    gaussian_mixture("full"),
    factor_analysers(),
    two_switches(),
    *(correlated(s, latent) for s in (1e-4, 1.0, 1e4) for latent in (False, True)),
    linear_map("event"),
    linear_map("plate"),
    walk(False),
    walk(True),
    gaussian_vector("auto"),
    gaussian_vector(NearestNeighbors(9)),
]
PLACED = [
    normal_latents("Poisson", 1, loose=1e-6),
    normal_latents("Bernoulli", 1),
    normal_latents("StudentT", 1, tol=1e-5),
    normal_latents("Poisson", 2, tol=1e-5, loose=0.2),
    normal_latents("Bernoulli", 2, loose=1e-6),
    normal_latents("StudentT", 2, Quadrature(24), tol=1e-3),
    normal_latents("Bernoulli", 3, tol=1e-5, loose=1e-4),
    positive_latent(),
    discrete_in_quadrature(),
    beta_bernoulli(Quadrature()),
]
CASES = [*EXACT, *PLACED]


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def store():
    with OwnStore():
        torch.default_generator.manual_seed(0)
        yield


def masks_of(n_tokens, n=6, seed=1):
    """Nothing visible, everything visible, and random ones."""
    rng = np.random.default_rng(seed)
    some = rng.uniform(size=(n, n_tokens)) < rng.uniform(0.2, 0.8, size=(n, 1))
    return np.concatenate([np.zeros((1, n_tokens), bool), np.ones((1, n_tokens), bool), some])


def true_conditionals(truth, x, visible):
    """(S, T) -> (S, N, T)."""
    seen = ~np.isnan(x)
    out = np.zeros((len(visible), *x.shape))
    for s, mask in enumerate(visible):
        shown = mask & seen
        before = truth.log_z(shown)
        for i in np.flatnonzero(~mask):
            more = shown.copy()
            more[:, i] = seen[:, i]
            out[s, :, i] = np.where(seen[:, i], truth.log_z(more) - before, 0.0)
    return out


def close(got, want, tol, scale=1.0):
    got, want = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tol * scale * (1 + np.abs(want).max() * 1e-2)


# ---------------------------------------------------------------------------------------------------- the battery


def test_the_tokens_that_were_read(case):
    ready = case.bound().read(case.tensors())
    assert ready.evidence().exact == case.exact
    assert np.array_equal(ready.value.numpy(), case.x, equal_nan=True)
    assert ready.scale == 1.0
    assert ready.structure.n_tokens == case.n_tokens


def test_joint(case):
    ready = case.read()
    want = case.truth(case.theta).log_z(~np.isnan(case.x))
    close(ready.score(), want, case.tol)
    if case.exact:
        found = ready.evidence()
        close(found.by_row, want, case.tol)
        assert found.se == 0


@pytest.mark.slow
def test_conditionals(case):
    ready = case.read()
    visible = masks_of(case.n_tokens, 6 if case.exact else 2)
    got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(case.truth(case.theta), case.x, visible), case.step_tol)
    hidden = ~visible[:, None] & ~np.isnan(case.x)
    assert (got.detach().numpy()[~hidden] == 0).all()


@pytest.mark.slow
def test_chains(case):
    ready = case.read()
    t = case.n_tokens
    rng = np.random.default_rng(2)
    orders = np.stack([np.arange(t)[::-1], rng.permutation(t), np.arange(t)])[: 3 if case.exact else 1]
    got = ready.chain(torch.as_tensor(orders.copy()))
    truth = case.truth(case.theta)
    seen = ~np.isnan(case.x)
    want = np.zeros((len(orders), *case.x.shape))
    for c, order in enumerate(orders):
        shown = np.zeros_like(seen)
        before = np.zeros(len(case.x))
        for i in order:
            shown[:, i] = seen[:, i]
            after = truth.log_z(shown)
            want[c, :, i] = np.where(seen[:, i], after - before, 0.0)
            before = np.where(shown.any(1), after, 0.0)
    close(got, want, case.step_tol)
    close(got.sum(-1), np.broadcast_to(truth.log_z(seen), got.shape[:2]), case.step_tol * t)


@pytest.mark.slow
def test_posterior(case):
    ready = case.read()
    truth = case.truth(case.theta)
    for visible in masks_of(case.n_tokens, 2 if case.exact else 1)[0 if case.exact else 1 :]:
        got = ready.posterior(torch.as_tensor(visible))
        shown = visible & ~np.isnan(case.x)
        tokens, latents = truth.tokens(shown), truth.latent_means(shown)
        if tokens is not None:  # hidden ones: a visible token's mean may be that at its latents, or itself
            scale = max(1.0, np.abs(tokens).max())
            close(got.tokens.detach()[torch.as_tensor(~shown)], tokens[~shown], 100 * case.tol, scale)
        if latents is not None:
            close(got.mean, latents, 100 * case.tol)
    everything = ready.posterior()
    last = ready.posterior(torch.ones(case.n_tokens, dtype=torch.bool))
    close(everything.tokens.nan_to_num(), last.tokens.detach().nan_to_num(), 1e-9)


def test_a_reading_keeps_its_answers(case):
    """Whatever is asked in between: the evidence, and other rows of the same program."""
    bound = case.bound()
    ready = bound.read(case.tensors())
    before = ready.posterior(), ready.score()
    ready.evidence()
    if ready.structure.by_row:
        other = bound.read(tuple(a[1:3] for a in case.tensors()))
        want = case.truth(case.theta).log_z(~np.isnan(case.x))[1:3]
        close(other.score(), want, case.tol)
    after = ready.posterior(), ready.score()
    torch.testing.assert_close(after[0].mean, before[0].mean, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(after[0].tokens, before[0].tokens, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["first", "with a hole", "nothing seen"])
def test_one_row(case, keep):
    bound = case.bound()
    if not bound.structure.by_row:
        pytest.skip("rows are one vector")
    row = {"first": 0, "with a hole": 1, "nothing seen": len(case.x) - 1}[keep]
    if keep == "with a hole" and not np.isnan(case.x[row]).any():
        row = 2
    if not case.exact and keep == "with a hole":
        pytest.skip("slow, and the same as the others")
    args = tuple(a[row : row + 1] for a in case.tensors())
    alone = bound.read(args)
    visible = masks_of(case.n_tokens, 1)[2:]
    truth = case.truth(case.theta)
    want = true_conditionals(truth, case.x, visible)[:, row : row + 1]
    close(alone.conditionals(torch.as_tensor(visible)), want, case.step_tol)
    close(alone.score(), truth.log_z(~np.isnan(case.x))[row : row + 1], case.tol)
    if keep == "nothing seen" and np.isnan(case.x[row]).all():
        assert float(alone.score().detach()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["joint", "conditionals"])
def test_gradients(case, what):
    ready = case.read()
    if not case.theta:
        pytest.skip("no parameters")
    if what == "conditionals" and case.loose > 1e-4:
        pytest.skip("the conditionals themselves are no better")
    visible = masks_of(case.n_tokens, 2)[2:]
    if what == "joint":
        total = ready.score().sum()
    else:
        total = ready.conditionals(torch.as_tensor(visible)).sum()
    leaves = {name: param(name).unconstrained() for name in case.theta}
    got = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    def value(theta):
        truth = case.truth(theta)
        if what == "joint":
            return truth.log_z(~np.isnan(case.x)).sum()
        return true_conditionals(truth, case.x, visible).sum()

    rng = np.random.default_rng(3)
    for name in case.theta:
        unit = max(np.abs(case.theta[name]).max(), 1e-12)
        way = rng.normal(size=np.shape(case.theta[name]))
        h = 1e-3 * unit

        def at(k, name=name, way=way, h=h):
            return value({**case.theta, name: case.theta[name] + k * h * way})

        # fourth order
        want = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
        have = float((got[name].numpy() * way).sum())
        slack = 1e-6 if case.exact else max(1e-5, 100 * case.tol, 100 * case.loose)
        assert abs(have - want) * unit <= slack * (1 + abs(want) * unit), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [UniformSize(1), EverySize(1), PermutationChain(1)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    "item",
    [latent_class_bernoulli(), two_latents(), gaussian_mixture("full"), factor_analysers()],
    ids=lambda c: c.name,
)
def test_averaged_over_masks_the_score_is_the_lml(item, policy):
    """Every mask of every size with the policy's weight, an enumeration; and draws of the policy."""
    ready = item.read()
    t = item.n_tokens
    drawn = [policy.draw(t, s) for s in range(40)]
    with torch.no_grad():
        scores = torch.stack([ready.score(d) for d in drawn])
        if drawn[0].order is not None:
            every = torch.einsum("cnt,ct->n", ready.chain(drawn[0].order), drawn[0].weight)
        else:
            visible = np.array(list(product([False, True], repeat=t)))[:-1]
            size = t - visible.sum(1)
            weight = 1 / size / np.array([math.comb(t, m) for m in size])
            weight = torch.as_tensor(weight[:, None] * ~visible)
            every = ready.score(Masks(torch.as_tensor(visible), None, weight))
    want = item.truth(item.theta).log_z(~np.isnan(item.x))
    full = ~np.isnan(item.x).any(1)  # a hole in a row is no token, which a weight of T/m does not know
    close(every[torch.as_tensor(full)], want[full], 1e-9)
    spread = scores[:, 0].std() / math.sqrt(len(scores))
    assert abs(float(scores[:, 0].mean()) - want[0]) <= 4.5 * float(spread) + 1e-9


# --------------------------------------------------------------------------------------- exact: further identities


@pytest.mark.slow
def test_a_long_chain_against_the_forward_algorithm():
    item, forward = hmm("Normal", n_steps=60, n_states=3, n_rows=4)
    ready = item.read()
    seen = ~np.isnan(item.x)
    with torch.no_grad():
        close(ready.score(), forward(item.theta, seen), 1e-9)
        visible = masks_of(60, 1)
        got = ready.conditionals(torch.as_tensor(visible[2:]))
        mask = visible[2] & seen
        want = np.zeros((4, 60))
        for i in np.flatnonzero(~visible[2]):
            more = mask.copy()
            more[:, i] = seen[:, i]
            want[:, i] = forward(item.theta, more) - forward(item.theta, mask)
        close(got[0], want, 1e-9)
        steps = ready.chain(torch.arange(60)[None])
        close(steps.sum(-1)[0], forward(item.theta, seen), 1e-9)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_gaussian_mixture_of_sklearn(kind):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(60, 3)), rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3)) + 3])
    fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(x)
    weights, means, cov = tensor(fitted.weights_), tensor(fitted.means_), tensor(fitted.covariances_)

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            if kind == "full":
                pyro.sample(
                    "x", dist.MultivariateNormal(means[z], scale_tril=torch.linalg.cholesky(cov)[z]), obs=x
                )
            else:
                pyro.sample("x", dist.Normal(means[z], cov[z].sqrt()).to_event(1), obs=x)

    bound = bound_of(program, (tensor(x),))
    close(bound.read((tensor(x),)).score(), fitted.score_samples(x), 1e-8)
    holed = holes(x, 3, row=False, share=0.4)
    holed[np.isnan(holed).all(1)] = x[0]
    lost = bound.read((tensor(holed),))
    full = cov.numpy() if kind == "full" else np.stack([np.diag(c) for c in cov.numpy()])
    want = []
    for row in holed:
        on = ~np.isnan(row)
        parts = [stats.multivariate_normal.logpdf(row[on], m[on], c[np.ix_(on, on)])
                 for m, c in zip(fitted.means_, full, strict=True)]  # fmt: skip
        want.append(logsumexp(parts, b=fitted.weights_))
    close(lost.score(), want, 1e-8)


def test_a_hidden_token_far_from_what_the_visible_ones_say():
    """The class is settled by x0; x1 lies 100 standard deviations off in that class."""

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample(
                "x", dist.Normal(100 * z[..., None] * x.new_tensor([1.0, 1.0]), 1.0).to_event(1), obs=x
            )

    x = torch.tensor([[0.0, 100.0], [0.0, 0.0]], dtype=torch.float64)
    ready = begin(program, (x,))
    truth = States([math.log(0.5)] * 2, [stats.norm.logpdf(x.numpy(), m) for m in (0, 100)])
    visible = np.array([[True, False]])
    want = true_conditionals(truth, x.numpy(), visible)
    close(ready.chain(torch.tensor([[0, 1]])).sum(-1)[0], truth.log_z(np.ones((2, 2), bool)), 1e-9)
    close(ready.conditionals(torch.as_tensor(visible)), want, 1e-9)


def test_parameters_far_off_keep_their_gradient():
    """The same where the ratio is representable: 30 standard deviations."""

    def program(x):
        m = pyro.param("m", x.new_tensor(30.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(m * z[..., None] * x.new_tensor([1.0, 1.0]), 1.0).to_event(1), obs=x)

    x = torch.tensor([[0.0, 30.0], [0.0, 0.0]], dtype=torch.float64)
    ready = begin(program, (x,))
    visible = np.array([[True, False]])

    def value(m):
        truth = States([math.log(0.5)] * 2, [stats.norm.logpdf(x.numpy(), c) for c in (0, m)])
        return true_conditionals(truth, x.numpy(), visible)

    got = ready.conditionals(torch.as_tensor(visible))
    close(got, value(30.0), 1e-9)
    (slope,) = torch.autograd.grad(got.sum(), pyro.param("m").unconstrained())
    want = (value(30.001).sum() - value(29.999).sum()) / 0.002
    assert abs(float(slope) - want) < 1e-5 * (1 + abs(want))


def test_the_imputed_category_is_the_likeliest():
    """Doc of `factors._mean`; of a mixture too."""

    p = tensor([[0.5, 0.2, 0.1, 0.2], [0.0, 0.2, 0.1, 0.7]])

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample(
                "x", dist.Categorical(p[z.long()][..., None, :].expand(*z.shape, 2, 4)).to_event(1), obs=x
            )

    x = tensor([[math.nan, math.nan], [0.0, 1.0], [1.0, 3.0]])
    ready = begin(program, (x,))
    got = ready.posterior().tokens
    assert got[0].tolist() == [3.0, 3.0]  # probabilities 0.25, 0.2, 0.1, 0.45


def test_a_mean_that_does_not_exist_is_not_made_up():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Cauchy(5.0 + z, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64)
    ready = begin(program, (x,))
    assert bool(ready.posterior().tokens[2].isnan().all())


def test_a_column_of_positive_tokens_without_any_observation():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.LogNormal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1), obs=x)

    x = torch.tensor([[1.0, math.nan], [2.0, math.nan]], dtype=torch.float64)
    ready = begin(program, (x,))
    want = logsumexp(
        [stats.lognorm.logpdf([1.0, 2.0], 1, scale=math.exp(m)) + math.log(0.5) for m in (0, 1)], axis=0
    )
    close(ready.score(), want, 1e-9)


def test_a_switch_of_chain_and_rows_of_one():
    """One row only, from the start."""
    for item in (
        latent_class_bernoulli(),
        hmm("Normal")[0],
        factor_analysers(),
        cell_latents(-1),
        cell_latents(-2),
    ):
        with OwnStore():
            args = tuple(a[:1] for a in item.tensors())
            ready = begin(item.program, args, item.theta)
            close(ready.score(), item.truth(item.theta).log_z(~np.isnan(item.x))[:1], 1e-9)
            t = item.n_tokens
            visible = masks_of(t, 1)
            want = true_conditionals(item.truth(item.theta), item.x, visible)[:, :1]
            close(ready.conditionals(torch.as_tensor(visible)), want, 1e-9)


def prior_of_class(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=5 * x.sum(-1)))
        pyro.sample("x", dist.StudentT(3.0, z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)


def prior_of_mean(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.mean(-1), 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)


def prior_of_scale(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Gamma(1 + x.abs().sum(-1), 1.0))
        pyro.sample("x", dist.Normal(0.0, z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)


def prior_of_switch(x):
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Bernoulli(logits=5 * x.sum(-1)))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("program", [prior_of_class, prior_of_mean, prior_of_scale, prior_of_switch])
def test_a_prior_that_looks_at_the_tokens_is_refused(program):
    x = np.random.default_rng(0).normal(size=(30, 3))
    refused("'[kz]'", program, (x,))


# ------------------------------------------------------------------------------------------------------- quadrature


@pytest.mark.parametrize("predictor", [Quadrature(), Importance(20)], ids=lambda p: type(p).__name__)
def test_nothing_left_for_nodes(predictor):
    """A linear-Gaussian program needs none: the exact answer, or an error that says so."""
    x = np.random.default_rng(0).normal(size=6)
    try:
        ready = begin(unknown_mean, (tensor(x),), predictor=predictor)
    except ModelError as error:
        assert "Exact" in str(error)
    else:
        truth = DenseGaussian(x[None], np.ones(6), 4 * np.ones((6, 6)) + 0.49 * np.eye(6))
        # draws were asked for, and have an error
        tol = 1e-9 if isinstance(predictor, Quadrature) else 0.1
        close(ready.score(), truth.log_z(np.ones((1, 6), bool)), tol)


def test_posterior_of_normal_latents_beside_discrete_ones():
    item = factor_analysers()
    ready = item.read()
    assert ready.posterior().mean.shape == (N_ROWS, 3 + 2)


def coin(a, b):
    def program(x):
        p = pyro.sample("p", dist.Beta(x.new_tensor(a), x.new_tensor(b)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    return program


HEADS = torch.tensor([1.0] * 50 + [0.0] * 50, dtype=torch.float64)


@pytest.mark.parametrize("a, b, value", [(1.0, 1.0, -71.398962), (20.0, 20.0, -69.945563)])
def test_fifty_heads_of_a_hundred(a, b, value):
    ready = begin(coin(a, b), (HEADS,), predictor=Quadrature())
    got = ready.evidence()
    assert float(got.by_row) == pytest.approx(value, abs=1e-6)
    assert float(ready.score()) == pytest.approx(betaln(a + 50, b + 50) - betaln(a, b), abs=1e-6)
    assert got.se < 1e-6


@pytest.mark.slow
def test_regression_with_an_unknown_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    y = x @ [1.0, -2.0, 0.5] + 0.7 * rng.normal(size=30)
    model = BayesianRegression(prior_scale=3.0, noise_shape=2.0, noise_rate=1.5)
    ready = begin(model, (tensor(x), tensor(y)), predictor=Quadrature())
    got = ready.evidence()
    assert float(got.by_row) == pytest.approx(model.log_evidence(x, y), abs=1e-8)
    # t with 2a degrees of freedom and shape (b / a) (I + s^2 X X')
    full = np.column_stack([x, np.ones(30)])
    shape = 1.5 / 2 * (np.eye(30) + 9 * full @ full.T)
    want = stats.multivariate_t.logpdf(y, shape=shape, df=4)
    assert float(ready.score()) == pytest.approx(want, abs=1e-8)
    visible = masks_of(30, 1)[[0, 2]]
    got = ready.conditionals(torch.as_tensor(visible)).numpy()
    for s, mask in enumerate(visible):
        before = (
            stats.multivariate_t.logpdf(y[mask], shape=shape[np.ix_(mask, mask)], df=4) if mask.any() else 0.0
        )
        for i in np.flatnonzero(~mask)[:4]:
            on = mask.copy()
            on[i] = True
            after = stats.multivariate_t.logpdf(y[on], shape=shape[np.ix_(on, on)], df=4)
            assert got[s, 0, i] == pytest.approx(after - before, abs=1e-6)


def groups_and_targets():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(6), 5)
    return group, 1.0 + 0.8 * rng.normal(size=6)[group] + 0.5 * rng.normal(size=30)


def random_intercept(known):
    group = torch.as_tensor(groups_and_targets()[0])

    def program(y):
        if known is None:
            b_sd = pyro.sample("b_sd", dist.HalfNormal(y.new_tensor(1.0)))
            e_sd = pyro.sample("e_sd", dist.HalfNormal(y.new_tensor(1.0)))
            mu = y.new_tensor(1.0)
        else:
            mu, b_sd, e_sd = (
                pyro.param(n, y.new_tensor(v)) for n, v in zip(("mu", "b", "e"), known, strict=True)
            )
        with pyro.plate("groups", 6):
            b = pyro.sample("b_g", dist.Normal(y.new_zeros(6), b_sd))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu + b[..., group], e_sd), obs=y)

    return program


def test_random_intercepts_against_statsmodels():
    mixed = pytest.importorskip(
        "statsmodels.regression.mixed_linear_model", reason="statsmodels is not installed"
    )
    group, y = groups_and_targets()
    fit = mixed.MixedLM(y, np.ones((30, 1)), group).fit(reml=False)
    known = (fit.fe_params[0], math.sqrt(fit.cov_re[0, 0]), math.sqrt(fit.scale))
    ready = begin(random_intercept(known), (tensor(y),))
    assert isinstance(ready, LinearRows)
    assert float(ready.score().detach()) == pytest.approx(fit.llf, abs=1e-7)
    # at the maximum all slopes are zero
    leaves = [pyro.param(n).unconstrained() for n in ("mu", "b", "e")]
    for slope in torch.autograd.grad(ready.score().sum(), leaves):
        assert abs(float(slope)) < 0.01


def test_random_intercepts_with_unknown_scales():
    group, y = groups_and_targets()
    ready = begin(random_intercept(None), (tensor(y),), predictor=Quadrature())
    assert (np.bincount(group) == 5).all()
    # eigenvalues of the compound symmetric blocks of five
    u = np.linspace(-5, 2, 281)
    b, e = np.exp(u)[:, None], np.exp(u)
    r = (y - 1).reshape(6, 5)
    m = r.mean(1)
    top, within_ss = e**2 + 5 * b**2, ((r - m[:, None]) ** 2).sum()
    log_p = -0.5 * (
        30 * LOG_2PI + 6 * np.log(top) + 48 * np.log(e) + 5 * (m**2).sum() / top + within_ss / e**2
    )
    log_p = log_p + stats.halfnorm.logpdf(b) + stats.halfnorm.logpdf(e) + u[:, None] + u
    # below exp(-5) the density of the groups' scale is flat: its integral there is density times exp(-5)
    want = np.logaddexp(
        logsumexp(log_p[1:]) + 2 * math.log(u[1] - u[0]), logsumexp(log_p[0]) + math.log(u[1] - u[0])
    )
    assert float(ready.score().detach()) == pytest.approx(want, abs=2e-3)
    found = ready.evidence()
    assert abs(float(found.by_row) - want) < max(1e-4, 3 * found.se)


def test_multivariate_tokens_with_a_scale_of_their_row():
    """Gamma precision over a MultivariateNormal token site: multivariate Student t."""
    rng = np.random.default_rng(4)
    root = np.tril(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    x = 2 * rng.normal(size=(4, 3))

    def program(x):
        with pyro.plate("rows", len(x)):
            tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), x.new_tensor(2.0)))
            tril = tensor(root) / tau.sqrt()[..., None, None]
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(3), scale_tril=tril), obs=x)

    ready = begin(program, (tensor(x),), predictor=Quadrature())
    want = stats.multivariate_t.logpdf(x, shape=root @ root.T, df=4)
    close(ready.score(), want, 1e-7)


def test_a_latent_of_tokens_beside_a_positive_one():
    """Normal loadings in closed form, a Gamma precision of the row by nodes; MultivariateNormal tokens."""
    rng = np.random.default_rng(4)
    root = np.tril(rng.normal(size=(3, 3))) + 2 * np.eye(3)
    x = 2 * rng.normal(size=(4, 3))
    f = rng.normal(size=3)

    def program(x):
        with pyro.plate("rows", len(x)):
            tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), x.new_tensor(2.0)))
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), tau.rsqrt()))
            tril = tensor(root) / tau.sqrt()[..., None, None]
            pyro.sample("x", dist.MultivariateNormal(u[..., None] * tensor(f), scale_tril=tril), obs=x)

    ready = begin(program, (tensor(x),), predictor=Quadrature())
    want = stats.multivariate_t.logpdf(x, shape=root @ root.T + np.outer(f, f), df=4)
    close(ready.score(), want, 1e-7)


@pytest.mark.parametrize("width", [2, 3])
def test_relocated_chains_add_up_to_the_joint(width):
    item = normal_latents("Poisson", width)
    ready = item.read()
    with torch.no_grad():
        got = ready.chain(torch.arange(item.n_tokens)[None]).sum(-1)[0]
        close(got, ready.score(), 1e-6)


# ------------------------------------------------------------------------------------------------------- importance


class GammaPoisson(NamedTuple):
    """A Gamma(a, b) rate for each row, closed form."""

    x: np.ndarray
    a: float = 2.0
    b: float = 1.5

    def log_z(self, shown):
        filled = np.where(shown, self.x, 0)
        total, n = filled.sum(1), shown.sum(1)
        out = self.a * math.log(self.b) - gammaln(self.a) + gammaln(self.a + total)
        return out - (self.a + total) * np.log(self.b + n) - gammaln(filled + 1).sum(1)


def counts(x):
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.5)))
        pyro.sample("x", dist.Poisson(rate[..., None].expand(*rate.shape, x.shape[1])).to_event(1), obs=x)


def exact_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x.sum(-1), x.new_tensor(1.5 + x.shape[1])))


def seeing_guide(x, visible):
    assert bool((x[~visible] == 0).all())
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x.sum(-1), 1.5 + visible.to(x).sum(-1)))


def rough_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(1.0 + 0.7 * x.sum(-1), x.new_tensor(1.0 + 0.6 * x.shape[1])))


COUNTS = np.random.default_rng(7).poisson(2, (N_ROWS, 3)).astype(float)
EVERYTHING = np.ones_like(COUNTS, dtype=bool)


def test_the_posterior_as_guide_has_no_variance():
    ready = begin(counts, (tensor(COUNTS),), predictor=Importance(20), guide=exact_guide)
    close(ready.score(), GammaPoisson(COUNTS).log_z(EVERYTHING), 1e-9)
    found = ready.evidence()
    assert found.se < 1e-6
    assert found.diagnostics["ess_min"] == pytest.approx(20)


def test_a_guide_that_sees_what_is_visible():
    x = holes(COUNTS)
    ready = begin(counts, (tensor(x),), predictor=Importance(4), guide=seeing_guide)
    truth = GammaPoisson(x)
    close(ready.score(), truth.log_z(~np.isnan(x)), 1e-9)
    torch.manual_seed(0)
    ready = begin(counts, (tensor(x),), predictor=Importance(4000), guide=seeing_guide)
    visible = masks_of(3, 3)
    got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(truth, x, visible), 0.15)
    steps = ready.chain(torch.tensor([[2, 0, 1]]))
    close(steps.sum(-1)[0], truth.log_z(~np.isnan(x)), 0.15)


def test_a_guide_that_has_seen_the_hidden_tokens():
    ready = begin(counts, (tensor(COUNTS),), predictor=Importance(20), guide=exact_guide)
    with pytest.raises(ModelError, match="visible"):
        ready.conditionals(torch.as_tensor(masks_of(3)))


def test_chains_are_the_importance_bound():
    x = holes(COUNTS, share=0.0)
    args = (tensor(COUNTS),)
    bound = bound_of(counts, args, predictor=Importance(30), guide=rough_guide)
    torch.manual_seed(5)
    ready = bound.read(args)
    torch.manual_seed(5)
    q = dist.Gamma(1.0 + 0.7 * args[0].sum(-1), tensor(1.0 + 0.6 * 3)).expand([30, N_ROWS])
    rate = q.sample()
    log_w = dist.Gamma(tensor(2.0), tensor(1.5)).log_prob(rate) - q.log_prob(rate)
    log_p = dist.Poisson(rate[..., None]).log_prob(args[0])
    want = (log_w + log_p.sum(-1)).logsumexp(0) - math.log(30)
    close(ready.score(), want, 1e-12)
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    steps = ready.chain(order)
    close(steps.sum(-1), want.expand(2, -1), 1e-12)
    # Z(nothing) is 1: the first step is the whole log Z of its token
    first = (log_w + log_p[..., 2]).logsumexp(0) - math.log(30)
    close(steps[0, :, 2], first, 1e-12)
    second = (log_w + log_p[..., [0, 2]].sum(-1)).logsumexp(0) - math.log(30) - first
    close(steps[0, :, 0], second, 1e-12)
    lost = bound.read((tensor(x),))
    assert float(lost.score()[-1]) == 0
    assert (lost.chain(order)[:, -1] == 0).all()


@pytest.mark.slow
def test_the_bound_lies_between_elbo_and_truth():
    args = (tensor(COUNTS),)
    truth = GammaPoisson(COUNTS).log_z(EVERYTHING).sum()
    found = {}
    for n in (1, 8):
        bound = bound_of(counts, args, predictor=Importance(n), guide=rough_guide)
        totals = []
        for _ in range(150):
            again = bound.read(args)
            totals.append(float(again.score().sum()))
        found[n] = np.mean(totals), np.std(totals) / math.sqrt(150)
    elbo, se = found[1]
    iwae, se_iwae = found[8]
    assert iwae > elbo - 3 * math.hypot(se, se_iwae)
    assert iwae < truth + 3 * se_iwae
    # the guide's own ELBO, by Pyro
    theirs = -np.mean([pyro.infer.Trace_ELBO().loss(counts, rough_guide, *args) for _ in range(150)])
    assert abs(theirs - elbo) < 5 * se


@pytest.mark.parametrize(
    "item",
    [normal_latents("Poisson", 1), normal_latents("Bernoulli", 2), positive_latent(), discrete_in_quadrature(),
     beta_bernoulli(None)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_draws_around_the_mode(item):
    torch.manual_seed(1)
    ready = begin(item.program, item.tensors(), item.theta, predictor=Importance(3000))
    truth = item.truth(item.theta)
    found = ready.evidence()
    want = truth.log_z(~np.isnan(item.x)).sum()
    assert abs(float(found.by_row.sum()) - want) < 4 * found.se
    assert found.se < 0.2
    assert found.diagnostics["pareto_k"] < 0.7
    with torch.no_grad():
        visible = masks_of(item.n_tokens, 1)[2:]
        got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(truth, item.x, visible), 0.15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_automatic_guides(kind):
    x = tensor(COUNTS)
    guide = getattr(autoguide, kind)(counts)
    svi = pyro.infer.SVI(counts, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    for _ in range(200):
        svi.step(x)
    bound = choose(counts, (x,), predictor=Importance(1000), guide=guide)
    ready = bound.read((x,))
    found = ready.evidence()
    want = GammaPoisson(COUNTS).log_z(EVERYTHING).sum()
    assert abs(float(found.by_row.sum()) - want) < 4 * found.se
    assert found.se < 1.0
    assert any("loc" in name for name in bound.parameters)
    total = ready.score().sum()
    leaf = dict(pyro.get_param_store().named_parameters())
    names = [n for n in leaf if "loc" in n]
    slopes = torch.autograd.grad(total, [leaf[n] for n in names])
    assert all(bool(torch.isfinite(s).all()) for s in slopes)
    if kind == "AutoNormal":
        assert ready.score().shape == (N_ROWS,)


def test_a_guide_of_points_is_refused():
    x = tensor(COUNTS)
    with pytest.raises(ModelError, match="rate"):
        begin(counts, (x,), predictor=Importance(10), guide=autoguide.AutoDelta(counts))


def test_a_coupled_guide_that_sees_what_is_visible():
    """One latent for all rows of a table of several columns."""

    def program(x):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.5)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate[..., None].expand(*rate.shape, 3)).to_event(1), obs=x)

    def guide(x, visible):
        pyro.sample("rate", dist.Gamma(2.0 + x.sum(), 1.5 + visible.to(x).sum()))

    flat = COUNTS.reshape(1, -1)
    torch.manual_seed(0)
    ready = begin(program, (tensor(COUNTS),), predictor=Importance(2000), guide=guide)
    truth = GammaPoisson(flat)
    close(ready.score(), truth.log_z(np.ones_like(flat, dtype=bool)), 1e-9)
    visible = masks_of(15, 1)[2:]
    got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(truth, flat, visible), 0.1)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_pareto_k(k):
    """exp(k Exponential) is Pareto with shape k; the estimate is drawn towards 1/2 by ten observations."""
    log_w = k * np.random.default_rng(0).exponential(size=(4000, 40))
    got = pareto_k(log_w)
    m = 3 * math.sqrt(4000)
    want = (k * m + 5) / (m + 10)
    assert abs(got.mean() - want) < 4 * (1 + k) / math.sqrt(m * 40) + 0.01
    assert np.abs(got - want).max() < 5 * (1 + k) / math.sqrt(m)
    assert np.isnan(pareto_k(log_w[:20])).all()
    assert np.allclose(pareto_k(log_w + 700), got)


@pytest.mark.parametrize(("width", "degrees"), [(1, 5.0), (2, 5.0), (9, 18.0)])
def test_student_t_is_that_of_pyro(width, degrees):
    t = 3 * torch.randn(20, 4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    peer = dist.MultivariateStudentT(degrees, torch.zeros_like(t[0, 0]), torch.eye(width).double())
    np.testing.assert_allclose(log_t(t, degrees), peer.log_prob(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n_draws", "n_rows"), [(100, 30), (117, 7), (1000, 20), (4000, 5)])
def test_pareto_k_is_that_of_pyro(n_draws, n_rows):
    rng = np.random.default_rng(n_draws)
    log_w = rng.exponential(size=(n_draws, n_rows)) * rng.uniform(0.1, 1.5, n_rows)
    log_w[:, 0] = 0.0  # weights that are all equal
    log_w[:, 1] = np.where(rng.random(n_draws) < 0.5, -np.inf, log_w[:, 1])
    ordered = np.sort(np.exp(log_w - log_w.max(0)), 0)
    n_tail = int(min(n_draws / 5, 3 * math.sqrt(n_draws)))
    tails = np.maximum(ordered[-n_tail:] - ordered[-n_tail - 1], np.finfo(float).tiny)  # (M, N)
    want = [fit_generalized_pareto(torch.as_tensor(tail.copy()))[0] for tail in tails.T]
    want[0] = -np.inf
    np.testing.assert_allclose(pareto_k(log_w), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_draws", [100, 1000])
@pytest.mark.parametrize("size", [0, 1, 50, 1e3, 1e6])
def test_weights_equal_to_rounding_have_no_heavy_tail(n_draws, size):
    """Log weights that are differences of two numbers of a size; what is left of a posterior drawn from itself."""
    joint = size * (1 + np.random.default_rng(0).normal(size=(n_draws, 300)) ** 2)
    assert (pareto_k((joint - 37.123) - joint) == -np.inf).all()
    some = pareto_k(np.r_[(joint - 37.123) - joint, np.full((4 * n_draws, 300), -50.0)])
    assert (some == -np.inf).all()  # four fifths of which count for nothing


def test_a_small_spread_of_weights_may_miss_a_wide_part():
    """For 5 % the posterior is 20 times as wide as what is drawn from: log weights hardly differ, the mean is low."""
    u = np.random.default_rng(0).normal(size=(1000, 200))
    log_w = np.logaddexp(math.log(0.95), math.log(0.05) + stats.norm.logpdf(u, 0, 20) - stats.norm.logpdf(u))
    w = np.exp(log_w)
    off, se = np.log(w.mean(0)), w.std(0) / math.sqrt(1000)
    assert log_w.std(0).mean() < 0.05
    assert np.median(off) < -0.04 and np.median(off / se) < -20
    assert (pareto_k(log_w) > 0.7).mean() > 0.7


def test_pareto_k_against_arviz():
    arviz = pytest.importorskip("arviz", reason="arviz is not installed")
    log_w = np.random.default_rng(0).exponential(size=(4000, 6)) * [0.2, 0.4, 0.6, 0.8, 1.0, 1.3]
    want = np.array([arviz.psislw(c)[1] for c in log_w.T]).reshape(-1)
    assert np.allclose(pareto_k(log_w), want, atol=0.02)


# ------------------------------------------------------------------------------------------- sequential Monte Carlo


def smc_of(program, args, **settings):
    torch.manual_seed(3)
    return begin(program, args, predictor=SequentialMonteCarlo(**settings))


def within(found, want):
    assert abs(float(found.by_row.sum()) - want) < 3.5 * found.se, (found.by_row, want, found.se)
    assert 0 < found.se < 0.3


def unknown_mean(y):
    m = pyro.sample("m", dist.Normal(y.new_tensor(1.0), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m, 0.7), obs=y)


class DenseGaussian(NamedTuple):
    x: np.ndarray  # (1, T)
    mean: np.ndarray
    cov: np.ndarray

    def log_z(self, shown):
        on = shown[0]
        if not on.any():
            return np.zeros(1)
        return np.array(
            [stats.multivariate_normal.logpdf(self.x[0, on], self.mean[on], self.cov[np.ix_(on, on)])]
        )


def test_particles_of_a_normal_mean():
    y = np.random.default_rng(2).normal(size=10) * 0.7 + 2
    y[3] = np.nan
    ready = smc_of(unknown_mean, (tensor(y),))
    truth = DenseGaussian(y[None], np.ones(10), 4 * np.ones((10, 10)) + 0.49 * np.eye(10))
    seen = ~np.isnan(y[None])
    within(ready.evidence(), truth.log_z(seen)[0])
    posterior = ready.posterior()
    precision = 0.25 + 9 / 0.49
    assert float(posterior.mean[0, 0]) == pytest.approx((0.25 + np.nansum(y) / 0.49) / precision, abs=0.05)
    visible = masks_of(10, 1)
    got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(truth, y[None], visible), 0.15)
    order = torch.randperm(10)[None]
    steps = ready.chain(order)
    assert float(steps.sum()) == pytest.approx(truth.log_z(seen)[0], abs=0.2)
    assert float(steps[0, 0, 3]) == 0


def test_particles_of_a_coin():
    ready = smc_of(coin(20.0, 20.0), (HEADS,))
    within(ready.evidence(), -69.945563)


def test_particles_answer_for_single_tokens():
    item = beta_bernoulli(SequentialMonteCarlo())
    torch.manual_seed(3)
    ready = begin(coin(2.0, 3.0), item.tensors(), predictor=SequentialMonteCarlo(num_particles=512))
    truth = item.truth({"a": math.log(2.0), "b": math.log(3.0)})
    seen = ~np.isnan(item.x)
    visible = masks_of(item.n_tokens, 2)
    got = ready.conditionals(torch.as_tensor(visible))
    close(got, true_conditionals(truth, item.x, visible), 0.1)
    steps = ready.chain(torch.randperm(item.n_tokens)[None])
    assert float(steps.sum()) == pytest.approx(truth.log_z(seen)[0], abs=0.1)
    assert (steps.numpy()[0][~seen] == 0).all()
    assert np.abs(ready.posterior().mean.numpy() - truth.latent_means(seen)).max() < 0.03


@pytest.mark.slow
def test_particles_of_a_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 2))
    y = x @ [1.0, -2.0] + 0.7 * rng.normal(size=25)
    model = BayesianRegression(prior_scale=3.0, noise_shape=2.0, noise_rate=1.5)
    ready = smc_of(model, (tensor(x), tensor(y)))
    within(ready.evidence(), model.log_evidence(x, y))


@pytest.mark.slow
def test_particles_with_classes_summed_out():
    """A weight that all rows share and a class for each row: Bernoulli mixtures, by a fine grid over the weight."""
    p = np.array([[0.2, 0.3], [0.9, 0.6]])
    x = holes(np.random.default_rng(1).integers(0, 2, (8, 2)), row=False)

    def program(x):
        w = pyro.sample("w", dist.Beta(x.new_tensor(2.0), x.new_tensor(2.0)))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(w))
            pyro.sample("x", dist.Bernoulli(tensor(p)[z.long()]).to_event(1), obs=x)

    nodes, weights = np.polynomial.legendre.leggauss(60)
    w = (nodes + 1) / 2
    log_p = nan_safe(stats.bernoulli.logpmf, x, p[:, None]).sum(-1)  # (2, N)
    given = np.logaddexp(np.log1p(-w)[:, None] + log_p[0], np.log(w)[:, None] + log_p[1]).sum(1)
    want = logsumexp(given + stats.beta.logpdf(w, 2, 2) + np.log(weights / 2))
    ready = smc_of(program, (tensor(x),))
    within(ready.evidence(), want)
    with OwnStore():
        quadrature = begin(program, (tensor(x),), predictor=Quadrature())
        assert float(quadrature.score()) == pytest.approx(want, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- errors


def refused(message, program, args=(COUNTS,), **how):
    with pytest.raises(ModelError, match=message):
        begin(program, tuple(tensor(a) for a in args), **how)


def test_a_guide_without_a_site():
    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("other", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    refused(r"no site for latent 'rate'.*add", counts, predictor=Importance(5), guide=guide)


def test_a_guide_with_a_surplus_site():
    def guide(x):
        exact_guide(x)
        pyro.sample("surplus", dist.Normal(0.0, 1.0))

    refused("'surplus'.*remove", counts, predictor=Importance(5), guide=guide)


def test_a_discrete_latent_that_is_too_large():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(5000)))
            pyro.sample("x", dist.Poisson(1.0 + z[..., None]).expand_by([]).to_event(1), obs=x[:, :1])

    refused("'z' has 5000 values.*fewer", program)


def test_a_poisson_latent():
    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_tensor(2.0)))
            pyro.sample("x", dist.Poisson(1.0 + z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)

    refused("'z' is Poisson.*Use", program)


def test_weights_that_are_not_finite():
    def guide(x):
        with pyro.plate("rows", len(x)), pyro.validation_enabled(False):
            pyro.sample("rate", dist.Gamma(x.sum(-1) * math.nan, x.new_tensor(1.0), validate_args=False))

    with pytest.raises(ModelError, match="guide|rate"), pyro.validation_enabled(False):
        ready = begin(counts, (tensor(COUNTS),), predictor=Importance(5), guide=guide)
        ready.score()


def test_nothing_observed():
    def program(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.5)))

    refused(r"observed site.*obs=x", program)


def test_no_rows_plate():
    """All is one vector then."""

    def program(x):
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Poisson(1.0 + z[..., None, None].expand(*z.shape, *x.shape)).to_event(2), obs=x)

    ready = begin(program, (tensor(COUNTS),))
    assert ready.value.shape == (1, COUNTS.size)
    want = logsumexp([stats.poisson.logpmf(COUNTS, m).sum() + math.log(w) for m, w in ((1, 0.7), (2, 0.3))])
    close(ready.score(), [want], 1e-9)


@pytest.mark.parametrize("predictor", [Exact(), Quadrature(), Importance(5)], ids=lambda p: type(p).__name__)
def test_tokens_that_change_between_calls(predictor):
    item = latent_class_bernoulli() if isinstance(predictor, Exact) else None
    if item is None:
        bound = bound_of(counts, (tensor(COUNTS),), predictor=predictor)
        with pytest.raises(ModelError, match="'x'.*tokens may not change"):
            bound.read((tensor(COUNTS[:, :2]),))
        return

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Poisson(1.0 + z[..., None].expand(*z.shape, x.shape[1])).to_event(1), obs=x)

    bound = bound_of(program, (tensor(COUNTS),), predictor=predictor)
    with pytest.raises(ModelError, match="'x'.*tokens may not change"):
        bound.read((tensor(COUNTS[:, :2]),))
    with pytest.raises(ModelError, match="read"):
        bound.read((tensor(COUNTS),)).at(tensor(COUNTS[:2])).score()


@pytest.mark.parametrize("predictor", [Quadrature(), SequentialMonteCarlo()], ids=lambda p: type(p).__name__)
def test_rows_that_change_where_they_are_one_vector(predictor):
    bound = bound_of(coin(1.0, 1.0), (HEADS,), predictor=predictor)
    with pytest.raises(ModelError, match="'x'.*rows"):
        again = bound.read((HEADS[:20],))
        again.score()


def test_a_factor():
    def program(x):
        counts(x)
        pyro.factor("penalty", x.new_tensor(-1.0))

    refused("'penalty' is a pyro.factor", program)


def test_particles_for_latents_of_rows():
    refused(r"'rate'.*rows plate 'rows'.*Quadrature", counts, predictor=SequentialMonteCarlo())


def test_particles_with_parameters():
    def program(y):
        sd = pyro.param("sd", y.new_tensor(1.0))
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), sd))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(m.exp()), obs=y)

    refused(r"pyro.params \['sd'\].*priors", program, (COUNTS[:, 0],), predictor=SequentialMonteCarlo())


def test_quadrature_of_five():
    def program(x):
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(u[..., :3].exp()).to_event(1), obs=x)

    refused(r"at most 4 continuous latents, got 5.*'u'.*Importance", program, predictor=Quadrature())
    assert bound_of(program, (tensor(COUNTS),)).name == "Importance"


def test_exact_for_what_is_not():
    refused(r"'rate'.*Quadrature", counts, predictor=Exact())


def test_no_latent_to_place():
    item = latent_class_bernoulli()
    for predictor in (Quadrature(), Importance(5), SequentialMonteCarlo()):
        with OwnStore():
            refused(
                r"no continuous latent.*Exact", item.program, (item.x,), theta=item.theta, predictor=predictor
            )


@pytest.mark.parametrize("noise", [1.0, 1e-9], ids=["normal equations", "QR"])
def test_joint_under_each_map_with_its_gradient(noise):
    """All maps at once against dense densities; a small noise goes another way, which must have gradients too."""
    rng = rng_of("under each")
    n_maps, n_tokens, n_latents = 3, 4, 2
    leaves = [
        tensor(a).requires_grad_()
        for a in (
            rng.normal(size=(n_maps, n_tokens)),
            rng.normal(size=(n_maps, n_tokens, n_latents)),
            noise * rng.uniform(0.5, 2.0, (n_maps, n_tokens)),
        )
    ]
    loc, loading, variance = leaves
    x = loc.detach()[[0, 1, 2, 0]] + tensor(rng.normal(size=(4, n_latents))) @ loading.detach()[0].mT

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(n_latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading.detach()[0].mT, 1.0).to_event(1), obs=x)

    like = LinearGaussian(program, (x,)).read((x,))
    zeros = x.new_zeros(n_maps, n_latents)
    reading = like.reading._replace(loc=loc, loading=loading, noise=variance, latent_loc=zeros)
    maps = LinearRows(like.structure, reading)
    got = maps.at(x).score_under_each()
    cov = loading @ loading.mT + torch.diag_embed(variance)
    want = dist.MultivariateNormal(loc[:, None], cov[:, None]).log_prob(x)
    rtol = 1e-9 if noise == 1.0 else 1e-5  # the dense covariance has squared the noise's share
    np.testing.assert_allclose(got.detach(), want.detach(), rtol=rtol)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        assert float((a - b).abs().max()) <= 10 * rtol * float(b.abs().max())
