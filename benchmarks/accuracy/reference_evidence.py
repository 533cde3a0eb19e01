"""Log marginal likelihoods of seven small models without bayes_mpt: truths for its tests, times to beat.

Every likelihood is normalised (all constants of the densities included, ``-log y!`` of the Poisson too),
every prior is proper unless said otherwise, and every evidence is the natural logarithm of the density of all
rows together. Standardised means mean 0 and standard deviation 1 with division by n. ``1`` is a column of
ones.

diabetes       scikit-learn's `load_diabetes`, n = 442, y standardised, the ten columns (as delivered: mean 0,
               sum of squares 1) times sqrt(442). For a subset S of k columns, X = [1, x_S]:
               s2 ~ InverseGamma(1, 1); w given s2 ~ Normal(0, variance s2) iid, k + 1 of them; y ~ Normal(X
               w, variance s2). In closed form.
coin           50 heads in a given sequence of 100 tosses: p ~ Beta(1, 1) or Beta(20, 20).
sleep          d = the ten paired differences of R's `sleep` data (Student). With ls = log sigma
               H1: ls ~ p(ls); delta ~ Cauchy(0, sqrt(2) / 2); d ~ Normal(exp(ls) delta, sd exp(ls)).
               H0: the same with delta = 0.
               Jeffreys' prior is p(ls) = 1 on the line. Uniform(-5, 5) gives a tenth of the same two
               integrals, to double precision, since the likelihood leaves nothing outside: the factor of this
               proper program is the JZS factor. The other proper priors show how far the factor moves.
breast_cancer  `load_breast_cancer`, n = 569, X = [1, the first five columns, each standardised], y = target
               (1 is benign): w ~ Normal(0, sd 2) iid, six of them; y ~ Bernoulli(logits = X w).
regression     50 rows of [1, ten covariates] simulated from the prior, the model of `diabetes`, eleven
               weights. Latents of the nested sampling: (w, log s2), twelve.
student        60 numbers simulated from the prior: mu ~ Normal(0, sd 2); log sigma ~ Normal(0, sd 1); y ~
               StudentT(df 4, location mu, scale sigma).
poisson        80 rows of [1, three covariates] simulated from the prior: w ~ Normal(0, sd 1) iid, four of
               them; y ~ Poisson(exp(X w)).

Simulated covariates and responses are rounded to four decimals before use and stored with the results, so
that the values do not depend on numpy's generators. Methods: closed form; quadrature by two routes;
importance sampling from a multivariate t around the Laplace approximation, once with a million independent
draws and once with as many of 16 scrambled Sobol sequences, whose spread gives the error; dynesty, whose
error is the one that it reports.

``se`` is a standard error for what is random, and an error bound or the difference of two routes for
quadrature. ``calls`` counts likelihoods of one parameter. Times are seconds on one thread; cpu is this
process's.

    python benchmarks/accuracy/reference_evidence.py            # 19 minutes, half in one dynesty run; writes the JSON
    python benchmarks/accuracy/reference_evidence.py --quick    # seconds; writes nothing unless --out says where

Asked: nothing; these are references for the tests, and the values are in reference_evidence.json.
"""

import argparse
import json
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from dynesty import NestedSampler
from scipy import integrate, optimize, special, stats
from sklearn.datasets import load_breast_cancer, load_diabetes
from threadpoolctl import threadpool_limits

LIBRARIES = ("dynesty", "numpy", "scipy", "scikit-learn")
OUT = Path(__file__).with_suffix(".json")
LOG_2PI = np.log(2 * np.pi)
SLEEP = (
    (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0),
    (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4),
)


class Table:
    """The results: one row a value, the clock between two `row` or `start` calls."""

    def __init__(self):
        self.problems, self.problem = {}, None
        self.start()

    def begin(self, name, **content):
        self.problem = self.problems[name] = {**content, "results": []}
        print(f"\n{name}", flush=True)
        self.start()

    def start(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def row(self, quantity, method, value, se=0.0, calls=1, **settings):
        row = {
            "quantity": quantity,
            "method": method,
            "value": float(value),
            "se": float(se),
            "cpu_s": time.process_time() - self.cpu,
            "wall_s": time.perf_counter() - self.wall,
            "calls": int(calls),
            "settings": settings,
        }
        self.problem["results"].append(row)
        print("   " + line(row), flush=True)
        self.start()
        return row["value"]


def line(row):
    quantity, method = row["quantity"], row["method"]
    return (
        f"{quantity:26s} {method:44s} {row['value']:15.8f}  se {row['se']:8.1e}  "
        f"cpu {row['cpu_s']:8.3f}  wall {row['wall_s']:8.3f}  calls {row['calls']:8d}"
    )


# ---- methods -----------------------------------------------------------------------------------------------


def conjugate(x, y, a=1.0, b=1.0):
    """Normal-inverse-gamma regression, prior precision of the weights I / s2."""
    n, k = x.shape
    precision = np.eye(k) + x.T @ x
    mean = np.linalg.solve(precision, x.T @ y)
    b_n = b + 0.5 * (y @ y - mean @ precision @ mean)
    a_n = a + n / 2
    return (
        -n / 2 * LOG_2PI
        - 0.5 * np.linalg.slogdet(precision)[1]
        + a * np.log(b)
        - a_n * np.log(b_n)
        + special.gammaln(a_n)
        - special.gammaln(a)
    )


def nested(table, quantity, likelihood, transform, n_dim, seeds, dlogz=None, **options):
    """One row for each seed; the median information, in nats, is returned."""
    label = " ".join(f"{k} {v}" for k, v in ({"nlive": 500} | options).items())
    label += "" if dlogz is None else f" dlogz {dlogz}"
    information = []
    for seed in seeds:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table.start()
            rng = np.random.default_rng(seed)
            sampler = NestedSampler(likelihood, transform, n_dim, rstate=rng, **options)
            sampler.run_nested(dlogz=dlogz, print_progress=False)
            r = sampler.results
        information.append(float(r.information[-1]))
        table.row(
            quantity,
            f"dynesty {label} seed {seed}",
            r.logz[-1],
            r.logzerr[-1],
            np.sum(r.ncall),
            **({"nlive": 500, "bound": "multi", "sample": "auto"} | options),
            dlogz=1e-3 * (r.nlive - 1) + 0.01 if dlogz is None else dlogz,
            seed=seed,
            n_dim=n_dim,
            iterations=int(r.niter),
            information=information[-1],
            efficiency_percent=float(r.eff),
            warnings=sorted({str(w.message)[:120] for w in caught}),
        )
    return float(np.median(information))


def importance(table, quantity, log_joint, mode, covariance, n_draws, seed=0, df=8.0, n_sequences=16):
    """Multivariate t around the Laplace approximation; independent draws, then scrambled Sobol sequences."""
    d, root = len(mode), np.linalg.cholesky(covariance)
    constant = (
        special.gammaln((df + d) / 2)
        - special.gammaln(df / 2)
        - d / 2 * np.log(df * np.pi)
        - np.log(np.diag(root)).sum()
    )

    def log_weights(u):
        out = []
        for part in np.array_split(u, max(1, len(u) // 8192)):
            part = np.clip(part, 2.0**-53, 1 - 2.0**-53)
            z = special.ndtri(part[:, :d]) * np.sqrt(df / (2 * special.gammaincinv(df / 2, part[:, d:])))
            density = constant - (df + d) / 2 * np.log1p((z**2).sum(1) / df)
            out.append(log_joint(mode + z @ root.T) - density)
        return np.concatenate(out)

    table.start()
    log_w = log_weights(np.random.default_rng(seed).random((n_draws, d + 1)))
    w = np.exp(log_w - log_w.max())
    table.row(
        quantity,
        "importance sampling, independent draws",
        log_w.max() + np.log(w.mean()),
        w.std(ddof=1) / w.mean() / np.sqrt(n_draws),
        n_draws,
        df=df,
        seed=seed,
        effective_draws=w.sum() ** 2 / (w**2).sum(),
        largest_weight_share=w.max() / w.sum(),
    )
    m = round(np.log2(n_draws / n_sequences))
    means = []
    for i in range(n_sequences):
        sobol = stats.qmc.Sobol(d + 1, rng=np.random.default_rng([seed + 1, i]))
        means.append(special.logsumexp(log_weights(sobol.random_base2(m))) - m * np.log(2))
    ratio = np.exp(np.array(means) - np.max(means))
    return table.row(
        quantity,
        f"importance sampling, Sobol, {n_sequences} x 2^{m}",
        np.max(means) + np.log(ratio.mean()),
        ratio.std(ddof=1) / ratio.mean() / np.sqrt(n_sequences),
        n_sequences * 2**m,
        df=df,
        seed=seed + 1,
    )


def laplace(table, quantity, log_joint, gradient, hessian, d):
    """Mode and inverse of the negative Hessian there; the approximate evidence is a row of its own."""
    table.start()
    fit = optimize.minimize(
        lambda w: -log_joint(w[None])[0],
        np.zeros(d),
        method="trust-exact",
        jac=lambda w: -gradient(w),
        hess=lambda w: -hessian(w),
        options={"gtol": 1e-8},
    )
    covariance = np.linalg.inv(-hessian(fit.x))
    value = log_joint(fit.x[None])[0] + d / 2 * LOG_2PI + 0.5 * np.linalg.slogdet(covariance)[1]
    table.row(
        quantity, "Laplace (approximate, for scale)", value, np.nan, fit.nfev, mode=fit.x, iterations=fit.nit
    )
    return fit.x, covariance


# ---- problems ----------------------------------------------------------------------------------------------


def diabetes(table, quick):
    data = load_diabetes()
    x, y = data.data * np.sqrt(len(data.data)), data.target
    y = (y - y.mean()) / y.std()
    names, n = list(data.feature_names), len(y)
    rng, subsets = np.random.default_rng(0), []
    while len(subsets) < 20:
        subset = sorted(rng.choice(10, size=rng.integers(1, 11), replace=False).tolist())
        if subset not in subsets:
            subsets.append(subset)
    table.begin(
        "diabetes",
        feature_names=names,
        y_head=y[:5],
        x_head=x[0],
        subset_rule="default_rng(0): size uniform on 1..10, then a choice without replacement; no repeats",
    )
    for subset in subsets:
        xs = np.column_stack([np.ones(n), x[:, subset]])
        table.start()
        value = conjugate(xs, y)
        table.row("{" + " ".join(map(str, subset)) + "}", "closed form", value, features=subset)

    subset = subsets[0]
    xs = np.column_stack([np.ones(n), x[:, subset]])
    name = "{" + " ".join(map(str, subset)) + "}"
    peak = conjugate(xs, y)
    table.start()
    kernel = np.eye(n) + xs @ xs.T
    t = stats.multivariate_t(np.zeros(n), kernel, df=2.0).logpdf(y)
    table.row(name, "scipy's multivariate t, n by n", t, abs(t - peak), features=subset)
    log_det, form = np.linalg.slogdet(kernel)[1], y @ np.linalg.solve(kernel, y)

    def integrand(log_s2):
        log_p = -0.5 * (n * (LOG_2PI + log_s2) + log_det + form * np.exp(-log_s2))
        return np.exp(log_p - log_s2 - np.exp(-log_s2) - peak)

    value, error, info = integrate.quad(integrand, -3, 3, epsabs=0, epsrel=1e-12, full_output=True)
    table.row(
        name,
        "quadrature over log s2 in (-3, 3)",
        peak + np.log(value),
        error / value,
        info["neval"],
        features=subset,
    )


def coin(table, quick):
    table.begin("coin", heads=50, tosses=100)
    for a in (1, 20):
        value = special.betaln(50 + a, 50 + a) - special.betaln(a, a)
        table.row(f"Beta({a}, {a})", "closed form", value, prior=[a, a])

        def integrand(p, a=a, value=value):
            return np.exp(50 * np.log(p * (1 - p)) + stats.beta.logpdf(p, a, a) - value)

        ratio, error, info = integrate.quad(
            integrand, 0, 1, points=[0.5], epsabs=0, epsrel=1e-12, full_output=True
        )
        table.row(
            f"Beta({a}, {a})",
            "quadrature over p",
            value + np.log(ratio),
            error / ratio,
            info["neval"],
            prior=[a, a],
        )


def sleep(table, quick):
    d = np.subtract(SLEEP[1], SLEEP[0])
    n, mean, scale = len(d), d.mean(), np.sqrt(2) / 2
    ss, total = ((d - mean) ** 2).sum(), (d**2).sum()
    t = mean / np.sqrt(ss / (n - 1) / n)
    table.begin("sleep", differences=np.round(d, 10), t=t, cauchy_scale=scale, published_factor=17.2589)

    # log densities at log sigma; delta integrates out of a normal against a Cauchy: a Voigt profile
    def h0(ls):
        return -n * (LOG_2PI / 2 + ls) - total / 2 * np.exp(-2 * ls)

    def h1(ls):
        voigt = special.voigt_profile(mean * np.exp(-ls), 1 / np.sqrt(n), scale)
        return (
            -n * (LOG_2PI / 2 + ls) - ss / 2 * np.exp(-2 * ls) + 0.5 * (LOG_2PI - np.log(n)) + np.log(voigt)
        )

    priors = {
        "Jeffreys, p(ls) = 1": (-12.0, 12.0, lambda ls: 0.0),
        "ls ~ Uniform(-5, 5)": (-5.0, 5.0, lambda ls: -np.log(10.0)),
        "ls ~ Uniform(-1, 3)": (-1.0, 3.0, lambda ls: -np.log(4.0)),
        **{
            f"ls ~ Normal(0, sd {sd})": (-12.0, 12.0, lambda ls, sd=sd: stats.norm.logpdf(ls, 0, sd))
            for sd in (1, 2, 3, 10, 100)
        },
        "sigma ~ HalfCauchy(1)": (
            -12.0,
            12.0,
            lambda ls: stats.halfcauchy.logpdf(np.exp(ls)) + ls,
        ),
    }
    panels = 240 if not quick else 60
    nodes, weights = np.polynomial.legendre.leggauss(10)

    def log_integral(log_p, log_prior, low, high, panels):
        edges = np.linspace(low, high, panels + 1)
        half = (high - low) / panels / 2
        points = (edges[:-1, None] + half * (1 + nodes)).ravel()
        return special.logsumexp(log_p(points) + log_prior(points), b=np.tile(half * weights, panels)), len(
            points
        )

    for name, (low, high, log_prior) in priors.items():
        evidence = {}
        for hypothesis, log_p in (("H1", h1), ("H0", h0)):
            table.start()
            rough = log_integral(log_p, log_prior, low, high, panels)[0]
            value, calls = log_integral(log_p, log_prior, low, high, 2 * panels)
            evidence[hypothesis] = value
            table.row(f"log Z {hypothesis}", f"quadrature, {name}", value, abs(value - rough), calls)
        factor = np.exp(evidence["H1"] - evidence["H0"])
        table.row("factor", f"quadrature, {name}", factor, calls=0, off=factor - 17.2589)

    # the same two-latent integral without the Voigt profile, delta = scale tan(angle)
    def joint(angle, ls):
        calls_2d[0] += 1
        shift = mean * np.exp(-ls) - scale * np.tan(angle)
        log_p = -n * (LOG_2PI / 2 + ls) - ss / 2 * np.exp(-2 * ls) - n / 2 * shift**2
        return np.exp(log_p + 20) / np.pi / 10

    calls_2d = [0]
    table.start()
    tolerance = 1e-6 if quick else 1e-10
    value, error = integrate.dblquad(
        joint, -1.5, 3.5, -np.pi / 2, np.pi / 2, epsabs=tolerance * 0.1, epsrel=tolerance
    )
    table.row(
        "log Z H1",
        "2-D quadrature, ls ~ Uniform(-5, 5)",
        np.log(value) - 20,
        error / value,
        calls_2d[0],
        box="ls in (-1.5, 3.5)",
    )
    # two formulas that need no sigma: Rouder et al. (2009) for the factor, and the noncentral t
    nu = n - 1

    def rouder(log_g):
        g = np.exp(log_g)
        c = 1 + n * g * scale**2
        log_p = -0.5 * np.log(c) - (nu + 1) / 2 * np.log1p(t**2 / c / nu)
        return np.exp(log_p - LOG_2PI / 2 - log_g / 2 - 0.5 / g)

    value, error, info = integrate.quad(rouder, -8, 40, epsabs=0, epsrel=1e-12, limit=200, full_output=True)
    null = (1 + t**2 / nu) ** (-(nu + 1) / 2)
    table.row("factor", "Rouder's integral over g", value / null, error / null, info["neval"])
    value, error, info = integrate.quad(
        lambda delta: stats.nct.pdf(t, nu, np.sqrt(n) * delta) * stats.cauchy.pdf(delta, 0, scale),
        -4,
        8,
        points=[0, 1],
        epsabs=0,
        epsrel=1e-10,
        full_output=True,
    )
    null = stats.t.pdf(t, nu)
    table.row("factor", "noncentral t over delta in (-4, 8)", value / null, error / null, info["neval"])


def breast_cancer(table, quick):
    data = load_breast_cancer()
    x, y = data.data[:, :5], data.target.astype(float)
    x = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    signed = np.where(y == 1, 1.0, -1.0)[:, None] * x  # log p(y | w) = -sum log(1 + exp(-signed w))
    signed_t = np.ascontiguousarray(signed.T)
    d, sd = 6, 2.0
    table.begin("breast_cancer", feature_names=data.feature_names[:5], x_head=x[0], n=len(y), ones=y.sum())

    def log_joint(w):
        log_prior = -d / 2 * LOG_2PI - d * np.log(sd) - 0.5 * (w**2).sum(1) / sd**2
        return log_prior - np.logaddexp(0, -(w @ signed_t)).sum(1)

    def gradient(w):
        return special.expit(-signed @ w) @ signed - w / sd**2

    def hessian(w):
        p = special.expit(signed @ w)
        return -(signed.T * (p * (1 - p))) @ signed - np.eye(d) / sd**2

    mode, covariance = laplace(table, "log Z", log_joint, gradient, hessian, d)
    importance(table, "log Z", log_joint, mode, covariance, 2**14 if quick else 10**6)

    def likelihood(w):
        return -np.logaddexp(0, -(signed @ w)).sum()

    def transform(u):
        return sd * special.ndtri(u)

    case = (table, "log Z", likelihood, transform, d)
    if quick:
        nested(*case, seeds=(0,), nlive=50, sample="rwalk")
        return
    nested(*case, seeds=(0,), nlive=250)
    information = nested(*case, seeds=(0,), nlive=500)
    # the error of a run that goes to its end is sqrt(information / nlive)
    enough = int(np.ceil(information / 0.1**2))
    nested(*case, seeds=(0,), nlive=enough, dlogz=0.01)
    nested(*case, seeds=range(3), nlive=500, sample="rwalk")
    nested(*case, seeds=range(3), nlive=enough, sample="rwalk", dlogz=0.01)
    nested(*case, seeds=(0,), nlive=2000, sample="rwalk", dlogz=0.01)


def regression(table, quick):
    rng, n, d = np.random.default_rng(0), 50, 11
    s2 = 1 / rng.gamma(1.0)
    w = np.sqrt(s2) * rng.normal(size=d)
    x = np.column_stack([np.ones(n), np.round(rng.normal(size=(n, d - 1)), 4)])
    y = np.round(x @ w + np.sqrt(s2) * rng.normal(size=n), 4)
    table.begin("regression", w=w, s2=s2, x=x[:, 1:], y=y)
    table.row("log Z", "closed form", conjugate(x, y))

    def likelihood(theta):
        log_s2 = theta[-1]
        residual = y - x @ theta[:-1]
        return -0.5 * (n * (LOG_2PI + log_s2) + residual @ residual * np.exp(-log_s2))

    def transform(u):
        log_s2 = -np.log(-np.log(u[-1]))  # InverseGamma(1, 1) is one over an exponential
        return np.append(np.exp(log_s2 / 2) * special.ndtri(u[:-1]), log_s2)

    case = (table, "log Z", likelihood, transform, d + 1)
    if quick:
        nested(*case, seeds=(0,), nlive=50)
        return
    nested(*case, seeds=range(3))
    nested(*case, seeds=(0,), dlogz=0.01)


def student(table, quick):
    rng, n, df = np.random.default_rng(1), 60, 4.0
    mu, ls = 2 * rng.normal(), rng.normal()
    y = np.round(mu + np.exp(ls) * rng.standard_t(df, size=n), 4)
    table.begin("student", mu=mu, log_sigma=ls, y=y)
    constant = special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - 0.5 * np.log(df * np.pi)

    def likelihood(theta):
        z = (y - theta[0]) * np.exp(-theta[1])
        return n * (constant - theta[1]) - (df + 1) / 2 * np.log1p(z**2 / df).sum()

    def log_joint(theta):
        prior = -LOG_2PI - np.log(2) - 0.5 * (theta[0] ** 2 / 4 + theta[1] ** 2)
        return likelihood(theta) + prior

    fit = optimize.minimize(lambda v: -log_joint(v), [np.median(y), np.log(y.std())], method="Nelder-Mead")
    mode, peak = fit.x, -fit.fun
    # eight posterior standard deviations in both directions, wide enough for the heavier side of log sigma
    box = np.array([np.exp(mode[1]) * 1.3 / np.sqrt(n), 0.12]) * 9
    (low_m, low_s), (high_m, high_s) = mode - box, mode + box
    calls = [0]

    def integrand(m, s):
        calls[0] += 1
        return np.exp(log_joint((m, s)) - peak)

    table.start()
    tolerance = 1e-5 if quick else 1e-10
    area = 4 * box.prod()
    value, error = integrate.dblquad(
        integrand, low_s, high_s, low_m, high_m, epsabs=tolerance * area * 1e-3, epsrel=tolerance
    )
    table.row(
        "log Z",
        "2-D adaptive quadrature",
        peak + np.log(value),
        error / value,
        calls[0],
        box=[[low_m, high_m], [low_s, high_s]],
    )
    # the trapezoidal rule on a box twice as wide
    m, s = (np.linspace(c - 2 * b, c + 2 * b, 201) for c, b in zip(mode, box, strict=True))
    log_p = [[log_joint((a, b)) for a in m] for b in s]
    trapezoid = special.logsumexp(log_p) + np.log((m[1] - m[0]) * (s[1] - s[0]))
    table.row(
        "log Z", "2-D trapezoid, twice the box", trapezoid, abs(trapezoid - peak - np.log(value)), 201**2
    )

    def transform(u):
        return special.ndtri(u) * (2.0, 1.0)

    case = (table, "log Z", likelihood, transform, 2)
    nested(*case, seeds=range(1 if quick else 3), **({"nlive": 50} if quick else {}))
    if not quick:
        nested(*case, seeds=(0,), nlive=4000, dlogz=0.01)


def poisson(table, quick):
    rng, n, d = np.random.default_rng(2), 80, 4
    w = rng.normal(size=d)
    x = np.column_stack([np.ones(n), np.round(rng.normal(size=(n, d - 1)), 4)])
    y = rng.poisson(np.exp(x @ w))
    table.begin("poisson", w=w, x=x[:, 1:], y=y)
    factorials = special.gammaln(y + 1).sum()
    moments = y @ x

    def log_joint(w):
        rate = np.exp(w @ x.T).sum(1)
        return w @ moments - rate - factorials - d / 2 * LOG_2PI - 0.5 * (w**2).sum(1)

    def gradient(w):
        return moments - np.exp(x @ w) @ x - w

    def hessian(w):
        return -(x.T * np.exp(x @ w)) @ x - np.eye(d)

    mode, covariance = laplace(table, "log Z", log_joint, gradient, hessian, d)
    importance(table, "log Z", log_joint, mode, covariance, 2**14 if quick else 10**6)

    def likelihood(w):
        return w @ moments - np.exp(x @ w).sum() - factorials

    seeds = range(1 if quick else 3)
    nested(table, "log Z", likelihood, special.ndtri, d, seeds=seeds, **({"nlive": 50} if quick else {}))


PROBLEMS = (diabetes, coin, sleep, breast_cancer, regression, student, poisson)


def plain(value):
    """Arrays and numpy numbers as JSON has them; null for what is not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def text(value, depth=0):
    """JSON, one line for each result and each field of a problem."""
    pad = "\n" + " " * depth
    if isinstance(value, dict) and depth < 3:
        items = [f"{pad} {json.dumps(k)}: {text(v, depth + 1)}" for k, v in value.items()]
        return "{" + ",".join(items) + pad + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ",".join(f"{pad} {json.dumps(v)}" for v in value) + pad + "]"
    return json.dumps(value)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds, few draws; stores nothing without --out"
    )
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args()
    out = args.out or (None if args.quick else OUT)
    begun, load, table = time.perf_counter(), os.getloadavg()[0], Table()
    with threadpool_limits(limits=1):
        for problem in PROBLEMS:
            problem(table, args.quick)
    machine = {
        "threads": 1,
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
    print("\n" + ", ".join(f"{k} {v}" for k, v in machine.items()))
    for name, problem in table.problems.items():
        for row in problem["results"]:
            print(f"{name:14s} {line(row)}")
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        content = {"about": __doc__, "quick": args.quick, "machine": machine, "problems": table.problems}
        out.write_text(text(plain(content)) + "\n")


if __name__ == "__main__":
    main()
