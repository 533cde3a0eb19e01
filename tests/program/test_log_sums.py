"""Sums over discrete latents against all joint values written out: values, slopes, curvature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops import packed

from bayes_mpt.predictors import Exact
from bayes_mpt.program import log_sums
from bayes_mpt.program.log_sums import LogSums

GRAPHS = {
    "one": ["a", "a", "a"],
    "chain": ["a", "ab", "bc", "cd", "b", "d", "d"],
    "tree": ["abc", "ad", "be", "e", "cf", ""],
    "apart": ["ab", "cd", "d", "b"],
    "loop": ["ab", "bc", "ca"],
}


def terms_of(dims, scale, n=3, holes=0.2, seed=0, plate=""):
    """Leaves and packed terms, with values far apart, some of them impossible."""
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for names in dims:
        shape = [n] * len(names) + [2] * len(plate)
        leaf = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(names) > 1:
            leaf[torch.rand(shape, generator=generator) < holes] = -math.inf
        leaves.append(leaf.requires_grad_())
    out = []
    for leaf, names in zip(leaves, dims, strict=True):
        term = leaf + 0
        term._pyro_dims = names + plate
        out.append(term)
    return leaves, out


def written_out(leaves, dims, plate=""):
    """log of the sum over all joint values."""
    every = sorted(set("".join(dims))) + list(plate)
    total = 0
    for leaf, names in zip(leaves, dims, strict=True):
        own = list(names) + list(plate)
        order = sorted(range(len(own)), key=lambda i: every.index(own[i]))
        moved = leaf.permute(order)
        total = total + moved.reshape(
            [moved.shape[sorted(own, key=every.index).index(d)] if d in own else 1 for d in every]
        )
    n_sum = len(set("".join(dims)))
    return total.flatten(0, n_sum - 1).logsumexp(0)


@pytest.mark.parametrize("way", ["directly", "by products", "in parts"])
@pytest.mark.parametrize("scale", [1.0, 60.0, 1500.0])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("plate", ["", "n"])
def test_values_and_slopes_are_those_of_all_joint_values(monkeypatch, graph, scale, way, plate):
    """Slopes are probabilities: those of far-off values keep their digits too."""
    monkeypatch.setattr(log_sums, "MAX_PRODUCT", 2**16 if way == "directly" else 0)
    monkeypatch.setattr(log_sums, "AT_ONCE", 4 if way == "in parts" else 2**22)
    dims = GRAPHS[graph]
    leaves, terms = terms_of(dims, scale, plate=plate)
    if plate:
        for term in terms:
            assert term._pyro_dims.endswith(plate)
    found = LogSums({"n": 2}).sumproduct(terms, set("".join(dims)))
    want = written_out(leaves, dims, plate)
    assert found._pyro_dims == plate
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-12)
    possible = want.detach().isfinite()
    assert bool(possible.any())
    slopes = torch.autograd.grad(found[possible].sum(), leaves)
    truths = torch.autograd.grad(want[possible].sum(), leaves)
    for slope, truth in zip(slopes, truths, strict=True):
        torch.testing.assert_close(slope, truth, rtol=1e-9, atol=1e-250)


@pytest.mark.parametrize("way", ["directly", "by products"])
def test_curvature(monkeypatch, way):
    monkeypatch.setattr(log_sums, "MAX_PRODUCT", 2**16 if way == "directly" else 0)
    leaves, _ = terms_of(GRAPHS["chain"], 1.0, holes=0.0, n=2)

    def log_z(*values):
        terms = []
        for value, names in zip(values, GRAPHS["chain"], strict=True):
            terms.append(packed.pack(value, dict(zip(range(-value.ndim, 0), names, strict=True))))
        return LogSums({}).sumproduct(terms, set("abcd"))

    assert torch.autograd.gradgradcheck(log_z, leaves, atol=1e-7)


@pytest.mark.parametrize("way", ["directly", "by products"])
def test_what_is_impossible_has_no_slope(monkeypatch, way):
    """And leaves those of other rows alone."""
    monkeypatch.setattr(log_sums, "MAX_PRODUCT", 2**16 if way == "directly" else 0)
    a = torch.tensor([[0.0, -math.inf], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[-math.inf, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    terms = [packed.pack(t, {-2: "n", -1: "z"}) for t in (a, b)] + [
        packed.pack(torch.zeros(2, 2).double(), {-2: "y", -1: "z"})
    ]
    found = LogSums({"n": 2}).sumproduct(terms, {"z", "y"})
    assert found.tolist() == [-math.inf, pytest.approx(math.log(4))]
    for slope in torch.autograd.grad(found[1], (a, b)):
        assert slope.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_what_sites_that_disagree_say_of_another():
    """A gradient that is cut off 36 nats below the maxima of the sites is no conditional."""

    def program(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            for t in range(3):
                pyro.sample(f"x_{t}", dist.Laplace(gap * z, 0.2), obs=x[:, t])

    for gap in (4.0, 8.0, 40.0, 400.0):
        x = torch.tensor([[0.0, gap, 0.0]], dtype=torch.float64)
        read = Exact().bind(program, (x,)).read((x,))
        # after one for each value the prior decides, and the third says the first again
        visible = torch.tensor([[True, True, False]])
        found = read.conditionals(visible)[0, 0, 2].detach()
        truth = math.log(2.5) + math.log(0.7 + 0.3 * math.exp(-gap / 0.2))
        assert float(found) == pytest.approx(truth, abs=1e-12)
        labels = read.posterior(visible[0]).labels().detach()
        assert float(labels.flatten()[-1]) == pytest.approx(0.3, abs=1e-12)
