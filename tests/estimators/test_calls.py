"""How a program is called: several tables, whole numbers, a network in single precision, data in a closure, flows."""

import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from scipy.stats import bernoulli, binom, multivariate_normal, norm
from torch.distributions import constraints
from truths import log_density

from bayes_mpt import BayesMPT
from bayes_mpt.predictors import Exact
from bayes_mpt.program.program import ModelError


def random(seed=0):
    return np.random.default_rng(seed)


def two_tables(x1, x2, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a * x1[:, 0] + (x2 * b).sum(-1), 0.5), obs=y)


def test_several_tables_are_the_arguments_of_the_program():
    x1, x2, y = random().normal(size=(12, 1)), random(1).normal(size=(12, 2)), random(2).normal(size=12)
    truth = float(log_density(y[None], np.zeros(12), 4 * x1 @ x1.T + x2 @ x2.T + 0.25 * np.eye(12))[0])
    fitted = BayesMPT(two_tables).fit((x1, x2), y)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert pickle.loads(pickle.dumps(fitted)).score((x1, x2), y) == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match=r"fit\(\(x1, x2\), y\)"):
        BayesMPT(two_tables).fit(x1, y)
    with pytest.raises(ValueError, match=r"a single column as a\[:, None\]"):
        BayesMPT(two_tables).fit((x1[:, 0], x2), y)


def groups(table, y):
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(table)):
        pyro.sample("y", dist.Normal(theta[table[:, 0]], 1.0), obs=y)


def test_columns_of_whole_numbers_are_indices():
    table, y = random().integers(3, size=(15, 1)), random(1).normal(size=15)
    truth = float(log_density(y[None], np.zeros(15), 4.0 * (table == table.T) + np.eye(15))[0])
    assert BayesMPT(groups).fit(table, y).log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match=r"x\[:, j\].long\(\)"):
        BayesMPT(groups).fit(table + 0.5, y)


def test_rows_are_of_the_precision_of_a_network_of_which_the_program_is_made():
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 1)
    before = network.weight.clone()

    def choice(x, y):
        with pyro.plate("rows", len(x)):
            logits = pyro.module("network", network)(x)[:, 0]
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    x, y = random().normal(size=(40, 2)), (random(1).uniform(size=40) < 0.5).astype(float)
    fitted = BayesMPT(choice).fit(x, y)
    weight, bias = (fitted.params_[f"network$$${name}"] for name in ("weight", "bias"))
    truth = bernoulli.logpmf(y, 1 / (1 + np.exp(-(x @ weight.T + bias)[:, 0]))).sum()
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, rel=1e-5)
    assert torch.equal(network.weight, before)


def test_data_in_a_closure_are_refused_with_the_line_to_write():
    def closed():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=torch.zeros(3))

    with pytest.raises(ModelError, match=r"closure.*\n?.*Write def closed\(x\) with obs=x"):
        BayesMPT(closed).fit(np.zeros((3, 1)))


def optional(x, y=None, flag=True):
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(x[:, 0] if flag else 0.0, 1.0), obs=y)


def test_optional_arguments_flags_and_returned_values():
    x, y = random().normal(size=(9, 1)), random(1).normal(size=9)
    for flag, mean in ((True, x[:, 0]), (False, 0.0)):
        found = BayesMPT(partial(optional, flag=flag)).fit(x, y).log_marginal_likelihood_
        assert found == pytest.approx(norm.logpdf(y, mean).sum(), abs=1e-10)


def response_inside(table):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(table)):
        pyro.sample("y", dist.Normal(table[:, :2] @ w, scale), obs=table[:, 2])


def test_response_and_covariates_of_one_table_are_told_apart():
    table = random().normal(size=(14, 3))
    fitted = BayesMPT(response_inside).fit(table)
    cov = table[:, :2] @ table[:, :2].T + fitted.params_["scale"] ** 2 * np.eye(14)
    truth = float(log_density(table[None, :, 2], np.zeros(14), cov)[0])
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flow = T.spline(1, count_bins=3, bound=4.0)

    def density(self):
        base = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [self.flow])

    def forward(self, x):
        pyro.module("flow", self.flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", self.density(), obs=x)


@torch.no_grad()
def test_a_flow_is_a_density_at_the_parameters_of_each_step():
    program, rows = Flow().double(), torch.as_tensor(random().normal(size=(8, 1)))
    bound = Exact().bind(program, (rows,))
    axis = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    for step in range(2):  # the same rows at other parameters: what a flow remembers is of the last ones
        for leaf in program.parameters():
            leaf.add_(0.3 * step)
        whole = bound.read((axis,)).score().exp().sum() * 18 / 20000
        assert float(whole) == pytest.approx(1.0, abs=1e-4)
        torch.testing.assert_close(
            bound.read((rows,)).score(), program.density().log_prob(rows.clone()), rtol=0, atol=1e-12
        )


def counted(x, latent=dist.Binomial):
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", latent)
        pyro.sample("x", dist.Normal(n, 0.5), obs=x[:, 0])


def test_binomial_latents_are_summed_out_and_poisson_ones_refused_with_the_rewrite():
    x = random().normal(2.0, 1.5, size=6)
    truth = np.log((binom.pmf([0, 1, 2], 2, 0.3) * norm.pdf(x[:, None], [0, 1, 2], 0.5)).sum(1)).sum()
    found = BayesMPT(partial(counted, latent=dist.Binomial(2, torch.tensor(0.3, dtype=torch.float64)))).fit(
        x[:, None]
    )
    assert found.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    with pytest.raises(ModelError, match=r"Poisson\(...\).log_prob\(torch.arange\(51.0\)\)"):
        BayesMPT(partial(counted, latent=dist.Poisson(torch.tensor(2.0)))).fit(x[:, None])


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x), subsample_size=4) as batch:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[batch, 0])


def test_a_subsampled_plate_beside_latents_of_the_data_set_takes_all_rows():
    x = random().normal(size=(11, 1))
    truth = float(log_density(x.T, np.zeros(11), 9.0 + np.eye(11))[0])
    fitted = BayesMPT(subsampled).fit(x)
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert fitted.score(x) == pytest.approx(truth, abs=1e-9)
    with pyro.plate("rows", 11, subsample_size=4) as batch:  # nothing is left of it
        assert len(batch) == 4
    with pytest.raises(ModelError, match="ELBO of one draw"):
        Exact().bind(subsampled, (torch.as_tensor(x),))


def one_latent_of_two_tables(x1, x2):
    with pyro.plate("rows", len(x1)):
        z = pyro.sample("z", dist.Normal(x1.new_zeros(()), 1.0))
        pyro.sample("x1", dist.Normal(z, 0.5), obs=x1[:, 0])
        pyro.sample("x2", dist.Normal(2 * z, 1.0), obs=x2[:, 0])


def test_two_tables_and_no_response():
    """One vector of the latent's covariance; single columns come as tables, and messages say how to read them."""
    x1, x2 = np.random.default_rng(1).normal(size=(2, 6, 1))
    fitted = BayesMPT(one_latent_of_two_tables).fit((x1, x2))
    cov = np.outer([1, 2], [1, 2]) + np.diag([0.25, 1.0])
    truth = multivariate_normal(np.zeros(2), cov).logpdf(np.hstack([x1, x2])).sum()
    assert fitted.log_marginal_likelihood_ == pytest.approx(truth, abs=1e-9)
    assert "tokens:          the 2 observations of sites 'x1', 'x2' in a row" in fitted.explain()
    with pytest.raises(
        ValueError, match=r"a single column as a\[:, None\], which the program reads as x\[:, 0\]"
    ):
        BayesMPT(one_latent_of_two_tables).fit((x1[:, 0], x2[:, 0]))
    with pytest.raises(
        ValueError, match=r"got 1D array of 6 numbers .* which the program reads as x\[:, 0\]"
    ):
        BayesMPT(one_latent_of_two_tables).fit(x1[:, 0], x2[:, 0])
