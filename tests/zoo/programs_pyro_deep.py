"""After Pyro's tutorials on networks: autoencoders, flows, exponential families, Bayesian networks of both kinds."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import DenseNN, PyroModule, PyroSample
from scipy.special import logsumexp
from scipy.stats import norm
from torch import nn
from torch.distributions import constraints
from truths import normal_grid
from zoo.case import Array, Case

from bayes_mpt.training import Ascent, Steps

PIXELS = 5


class Decoder(nn.Module):
    def __init__(self, n_in):
        super().__init__()
        self.fc1 = nn.Linear(n_in, 4)
        self.fc21 = nn.Linear(4, PIXELS)

    def forward(self, z):
        return torch.sigmoid(self.fc21(nn.functional.softplus(self.fc1(z))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, 4)
        self.fc21 = nn.Linear(4, 2)
        self.fc22 = nn.Linear(4, 2)

    def forward(self, x):
        hidden = nn.functional.softplus(self.fc1(x))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(2)

    def forward(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], 2)))
            z_scale = x.new_ones(torch.Size((x.shape[0], 2)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(loc_img).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


class LabelledVAE(nn.Module):
    """Images of three kinds; the kind of some is known."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder(4)

    def forward(self, x, labels):
        pyro.module("ss_vae", self)
        seen = ~labels.isnan()
        with pyro.plate("data", x.shape[0]):
            zs = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[0], 1), 1.0).to_event(1))
            prior = x.new_ones(3) / 3
            ys = pyro.sample("y", dist.Categorical(prior), obs=labels.nan_to_num(), obs_mask=seen)
            kind = nn.functional.one_hot(ys.long(), 3).to(zs.dtype)
            zs, kind = torch.broadcast_tensors(zs, kind[..., :1])[0], kind
            batch = torch.broadcast_shapes(zs.shape[:-1], kind.shape[:-1])
            joined = torch.cat([zs.expand(*batch, 1), kind.expand(*batch, 3)], -1)
            pyro.sample("x", dist.Bernoulli(self.decoder(joined)).to_event(1), obs=x)


def bayesian_network_rain(table):
    rainy = pyro.param("rainy", torch.tensor(0.3), constraint=constraints.unit_interval)
    wet = torch.tensor([[0.01, 0.8], [0.9, 0.99]])  # by sprinkler, rain
    with pyro.plate("days", len(table)):
        rain = pyro.sample("rain", dist.Bernoulli(rainy), infer={"enumerate": "parallel"})
        on = pyro.sample("sprinkler", dist.Bernoulli(torch.where(rain == 1, 0.01, 0.4)), obs=table[:, 0])
        pyro.sample("wet", dist.Bernoulli(wet[on.long(), rain.long()]), obs=table[:, 1])


class TinyBNN(PyroModule):
    def __init__(self, hid_dim=2, prior_scale=2.0):
        super().__init__()
        self.activation = nn.Tanh()
        self.layer1 = PyroModule[nn.Linear](1, hid_dim)
        self.layer2 = PyroModule[nn.Linear](hid_dim, 1)
        self.layer1.weight = PyroSample(dist.Normal(0.0, prior_scale).expand([hid_dim, 1]).to_event(2))
        self.layer1.bias = PyroSample(dist.Normal(0.0, prior_scale).expand([hid_dim]).to_event(1))
        self.layer2.weight = PyroSample(dist.Normal(0.0, prior_scale).expand([1, hid_dim]).to_event(2))
        self.layer2.bias = PyroSample(dist.Normal(0.0, prior_scale).expand([1]).to_event(1))

    def forward(self, x, y=None):
        x = x.reshape(-1, 1)
        x = self.activation(self.layer1(x))
        mu = self.layer2(x).squeeze()
        sigma = pyro.sample("sigma", dist.Gamma(2.0, 4.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mu, sigma), obs=y)
        return mu


def deep_exponential_family(x):
    alpha, rate = torch.tensor(0.5), torch.tensor(0.5)
    with pyro.plate("w_top_plate", 2):
        w_top = pyro.sample("w_top", dist.Gamma(alpha, rate))
    with pyro.plate("w_bottom_plate", 2 * x.shape[1]):
        w_bottom = pyro.sample("w_bottom", dist.Gamma(alpha, rate))
    w_bottom = w_bottom.reshape(2, x.shape[1])
    with pyro.plate("data", x.shape[0]):
        z_top = pyro.sample("z_top", dist.Gamma(alpha, rate))
        mean = z_top.unsqueeze(-1) * w_top
        z_bottom = pyro.sample("z_bottom", dist.Gamma(alpha, alpha / mean).to_event(1))
        pyro.sample("obs", dist.Poisson(torch.matmul(z_bottom, w_bottom)).to_event(1), obs=x)


class Flow(nn.Module):
    """An affine coupling: the second column is moved and scaled by what a network makes of the first."""

    def __init__(self):
        super().__init__()
        self.coupling = T.AffineCoupling(1, DenseNN(1, [2], [1, 1], nonlinearity=nn.Tanh()))

    def forward(self, x):
        pyro.module("coupling", self.coupling)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [self.coupling]), obs=x)


def images(rng: np.random.Generator) -> Array:
    z = rng.normal(size=(40, 1))
    return (rng.uniform(size=(40, PIXELS)) < 1 / (1 + np.exp(-1.2 * z * np.array([1, 1, -1, -1, 1])))).astype(
        float
    )


def some_labels(rng: np.random.Generator) -> tuple[Array, Array]:
    kind = rng.integers(3, size=30)
    p = np.array([[0.9, 0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9, 0.1], [0.1, 0.5, 0.1, 0.5, 0.9]])[kind]
    labels = np.where(rng.uniform(size=30) < 0.5, kind, np.nan)
    return (rng.uniform(size=p.shape) < p).astype(float), labels


def days(rng: np.random.Generator) -> tuple[Array]:
    rain = rng.uniform(size=40) < 0.3
    on = rng.uniform(size=40) < np.where(rain, 0.01, 0.4)
    wet = rng.uniform(size=40) < np.where(on, np.where(rain, 0.99, 0.9), np.where(rain, 0.8, 0.01))
    return (np.column_stack([on, wet]).astype(float),)


def curve(rng: np.random.Generator) -> tuple[Array, Array]:
    x = rng.uniform(-1, 1, size=(20, 1))
    return x, np.tanh(3 * x[:, 0]) + 0.1 * rng.normal(size=20)


def counts(rng: np.random.Generator) -> tuple[Array]:
    return (rng.poisson(rng.gamma(1, 2, size=(20, 1)) * np.array([0.5, 1.0, 2.0])).astype(float),)


def banana(rng: np.random.Generator) -> tuple[Array]:
    first = rng.normal(size=60)
    return (np.column_stack([first, np.sin(2 * first) + 0.3 * rng.normal(size=60)]),)


def of_prefix(params: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): v for n, v in params.items() if n.startswith(prefix)}


def log_pixels(p: dict[str, Array], x: Array, z: Array) -> Array:
    """(N, nodes) log-probability of each image given the decoder's input (nodes, L)."""
    hidden = np.logaddexp(0, z @ p["fc1.weight"].T + p["fc1.bias"])
    logits = hidden @ p["fc21.weight"].T + p["fc21.bias"]  # (nodes, T)
    return -np.logaddexp(0, np.where(x[:, None] == 1, -logits, logits)).sum(-1)


def over_codes(params, x):
    node, log_weight = normal_grid(7, 101)
    z = np.stack(np.meshgrid(node, node, indexing="ij"), -1).reshape(-1, 2)
    log_w = (log_weight[:, None] + log_weight).ravel()
    exact = logsumexp(log_pixels(of_prefix(params, "decoder$$$"), x, z) + log_w, axis=1).sum()
    return exact, exact


def over_kinds_and_codes(params, x, labels):
    node, log_weight = normal_grid(8, 1601)  # the decoder may end as a step
    p = of_prefix(params, "ss_vae$$$decoder.")
    of_kind = np.stack(
        [
            logsumexp(
                log_pixels(p, x, np.column_stack([node, np.tile(row, (len(node), 1))])) + log_weight, axis=1
            )
            for row in np.eye(3)
        ]
    ) - np.log(3)  # (3, N)
    total = logsumexp(of_kind, axis=0)
    seen = ~np.isnan(labels)
    total[seen] = of_kind[labels[seen].astype(int), seen]
    return total.sum()


def both_weathers(params, table):
    on, wet = table.T.astype(bool)
    rainy = params["rainy"]
    terms = []
    for p_rain, p_on, p_dry, p_wet in ((1 - rainy, 0.4, 0.01, 0.9), (rainy, 0.01, 0.8, 0.99)):
        of_wet = np.where(on, p_wet, p_dry)
        terms.append(p_rain * np.where(on, p_on, 1 - p_on) * np.where(wet, of_wet, 1 - of_wet))
    return np.log(np.sum(terms, axis=0)).sum()


def coupled(params, x):
    """x_2 = mean(x_1) + exp(log_scale(x_1)) z_2; Pyro keeps log_scale within -5 and 3."""
    p = of_prefix(params, "coupling$$$nn.layers.")
    hidden = np.tanh(x[:, :1] @ p["0.weight"].T + p["0.bias"])
    mean, log_scale = (hidden @ p["1.weight"].T + p["1.bias"]).T
    log_scale = np.clip(log_scale, -5, 3)
    return (norm.logpdf(x[:, 0]) + norm.logpdf(x[:, 1], mean, np.exp(log_scale))).sum()


def sparse_gammas(params, x):
    """-129.781 +- .014 by draws, -129.84 +- .04 by particles (`zoo.sparse_gammas`): two errors of the first."""
    return -129.809, -129.753


CASES = [
    Case(
        "vae",
        VAE,
        lambda rng: (images(rng),),
        over_codes,
        settings={"training": Steps(max_iter=300)},
        se=1.5,
        warns="without meeting its stopping rule",
        seed=1,
        slow=True,
    ),
    Case(
        "ss_vae_labels",
        LabelledVAE,
        some_labels,
        over_kinds_and_codes,
        # one weight of the decoder grows without bound: the best picture is a step in z, steep by then
        settings={"training": Ascent(max_iter=40)},
        tolerance=1e-6,
        se=1e-6,
        warns="without meeting its stopping rule",
        slow=True,
    ),
    Case("bayesian_network_rain", bayesian_network_rain, days, both_weathers),
    Case("bayesian_neural_network", TinyBNN, curve, slow=True),
    Case(
        "deep_exponential_family",
        deep_exponential_family,
        counts,
        sparse_gammas,
        se=0.4,
        warns="tail so heavy",
        slow=True,
    ),
    Case("normalizing_flow", Flow, banana, coupled, warns="no smooth maximum", slow=True),
]
