"""The example of a changed network, masked token optimisation: attention and penalties against numpy."""

import json
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from site_chain import L, gap, logits, rows_and_masks, said, sample, shaken
from sklearn.base import clone
from truths import transformer_by_hand

from bayes_mpt import BayesMPT
from bayes_mpt.masks import Masks
from bayes_mpt.models import MaskedTransformer
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.program.sites import base
from bayes_mpt.training import Epochs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from optimized_mask import NOTHING, OptimizedMaskTransformer

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

ROOT = Path(__file__).parents[2]


def expected(params, x, visible, model):
    """Of the program in numpy: logits (N, T, L), H (N, layers + 1) and attention to hidden tokens (N, layers)."""

    def entropy(h, seen):
        rows = []
        for i in np.flatnonzero(~seen):
            cos = [h[i] @ h[j] / np.linalg.norm(h[i]) / np.linalg.norm(h[j]) for j in np.flatnonzero(seen)]
            share = np.exp(np.array(cos) / model.temperature)
            share = share / share.sum()
            rows.append(-(share * np.log(share)).sum() / np.log(len(cos)))
        return np.mean(rows)

    def pulled(layer, seen):
        n = model.n_layers
        g = (1 - layer / (n - 1) if n > 1 else 1.0) if model.recalibrate else 0.0
        return np.where(seen, 1.0, 1.0 - g)

    x, visible = x.numpy(), visible.numpy()
    logits, states, shares = transformer_by_hand(params, x, visible, model.n_heads, model.n_layers, pulled)
    h = [[entropy(h, seen) for h in of_row] for of_row, seen in zip(states, visible, strict=True)]
    rows = zip(shares, visible, strict=True)
    mass = [
        share[..., seen, :][..., ~seen].sum((1, 2, 3)) / seen.sum() / share.shape[1] for share, seen in rows
    ]
    return logits, np.array(h), np.array(mass)


def factors(model, x, visible):
    """Logarithms of the factors (N,) by name, the spatial ones of all layers as one; and the site of the tokens."""
    nodes = pyro.poutine.trace(model).get_trace(x, visible).nodes
    found = {}
    for name, node in nodes.items():
        if name.startswith(("spatial", "singular", "falling")):
            name = name.rstrip("0123456789")
            found[name] = found.get(name, 0.0) + base(node["fn"]).log_factor
    return found, base(nodes["x"]["fn"])


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"recalibrate": True},
        {"spatial": 0.7},
        {"singular": 0.7, "temperature": 0.3},
        {"falling": 0.7, "margin": 0.05},
        {
            "recalibrate": True,
            "spatial": 0.4,
            "singular": 0.5,
            "falling": 0.6,
            "margin": 0.1,
            "temperature": 0.2,
        },
    ],
)
def test_attention_and_penalties_are_those_written_out(own_store, in_double, change, n_layers):
    x, visible = rows_and_masks()
    model = OptimizedMaskTransformer(8, n_layers, 2, n_levels=L, **{**NOTHING, **change})
    params = shaken(model, x)
    found, tokens = factors(model, x, visible)
    out, h, mass = expected(params, x, visible, model)
    np.testing.assert_allclose(tokens.logits.detach(), out, rtol=0, atol=1e-11)
    early = np.linspace(1, 0, n_layers) if n_layers > 1 else np.ones(1)
    terms = {
        "spatial": model.spatial * mass @ early / early.sum(),
        "singular": model.singular * (1 - h[:, 0]),
        "falling": model.falling * np.maximum(np.diff(h, axis=1) + model.margin, 0).sum(1),
    }
    if model.recalibrate and n_layers < 3:  # where g is one or zero everywhere
        np.testing.assert_allclose(terms.pop("spatial"), 0.0, rtol=0, atol=1e-300)
    assert set(found) == {name for name in terms if getattr(model, name)}
    for name, value in found.items():
        np.testing.assert_allclose(-value.detach(), terms[name], rtol=0, atol=1e-11)
    np.testing.assert_allclose(model.heterogeneity(params, x, visible), h.mean(0), rtol=0, atol=1e-11)


def test_visible_tokens_see_no_hidden_ones_in_the_first_layer():
    """With one layer, what is said at visible tokens is the same whatever the mask token; else it is not."""
    x = torch.as_tensor(sample(30, 0))
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, 0] = True
    for change, n_layers, same in (({}, 1, True), (NOTHING, 1, False), ({}, 3, False)):
        model = OptimizedMaskTransformer(16, n_layers, 2, **change)
        with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
            first = said(model, x, visible)
            pyro.param("mask").add_(torch.linspace(-1, 1, 16))
            second = said(model, x, visible)
        assert torch.equal(first[visible], second[visible]) is same
        assert not torch.equal(first[~visible], second[~visible])


def test_heterogeneity_where_it_has_no_meaning(own_store, in_double):
    """Rows with one visible token, none, or all: left out of the mean, no penalty but the margin, finite gradients."""
    x, visible = rows_and_masks(6)
    visible[0], visible[1], visible[2] = False, True, False
    visible[2, 3] = True
    model = OptimizedMaskTransformer(8, 3, 2, n_levels=L, spatial=1.0, singular=1.0, falling=1.0, margin=0.25)
    params = shaken(model, x)
    _, h, _ = expected(params, x[3:], visible[3:], model)
    holed = x.clone()
    holed[3:][~visible[3:]] = torch.nan  # missing is hidden
    found = model.heterogeneity(params, holed, torch.where(holed.isnan(), True, visible))
    np.testing.assert_allclose(found, h.mean(0), rtol=0, atol=1e-11)
    terms, _ = factors(model, x, visible)
    assert bool((terms["singular"][:3] == 0).all()) and bool((terms["spatial"][:2] == 0).all())
    np.testing.assert_allclose(terms["falling"][:3].detach(), -0.75, atol=1e-12)
    sum(f.sum() for f in terms.values()).backward()
    leaves = dict(pyro.get_param_store().named_parameters()).values()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.grad is not None)


def test_penalties_train_and_enter_no_score(own_store, in_double):
    x, visible = rows_and_masks()
    plain = MaskedTransformer(8, 2, 2, n_levels=L)
    penalised = OptimizedMaskTransformer(
        8, 2, 2, n_levels=L, recalibrate=False, spatial=0.4, singular=0.5, falling=0.6, margin=0.1
    )
    params = shaken(plain, x)
    _, h, mass = expected(params, x, visible, penalised)
    each = 0.4 * mass[:, 0] + 0.5 * (1 - h[:, 0]) + 0.6 * np.maximum(np.diff(h, axis=1) + 0.1, 0).sum(1)
    weight = torch.rand(1, *x.shape, generator=torch.Generator().manual_seed(2))
    scores = {}
    for name, model in {"plain": plain, "penalised": penalised}.items():
        read = SelfPredictive(2).bind(model, (x,)).read((x,))
        with torch.no_grad():
            scores[name] = (
                read.score(Masks(visible[None], None, weight)),
                read.score(),
                read.evidence().by_row,
            )
        scores[f"{name}, trained"] = (read.score(Masks(visible[None], None, weight)).detach(),)
    for a, b in zip(scores["plain"], scores["penalised"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_array_equal(scores["plain"][0], scores["plain, trained"][0])
    lost = (scores["penalised"][0] - scores["penalised, trained"][0]).numpy()
    hidden_weight = (weight[0] * ~visible).sum(1).numpy()
    np.testing.assert_allclose(lost, each * hidden_weight, rtol=1e-9)


def test_terms_left_out_leave_the_plain_network_to_the_bit():
    settings = {
        "training": Epochs(max_epochs=2, validation_fraction=0.0),
        "random_state": 0,
        "predictor": SelfPredictive(1),
    }
    networks = (
        MaskedTransformer(16, 2, 2),
        OptimizedMaskTransformer(16, 2, 2, **NOTHING),
        OptimizedMaskTransformer(16, 2, 2),
    )
    plain, nothing, optimised = (BayesMPT(net, **settings).fit(sample(256, 0)).params_ for net in networks)
    assert all((plain[k] == nothing[k]).all() for k in plain)
    assert not all((plain[k] == optimised[k]).all() for k in plain)
    # penalties alone say nothing else at the same parameters
    x = torch.as_tensor(sample(30, 0))
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    same = logits(MaskedTransformer(16, 2, 2, n_levels=L), x, visible)
    for name in ("singular", "falling"):
        model = OptimizedMaskTransformer(16, 2, 2, n_levels=L, **{**NOTHING, name: 1.0})
        assert torch.equal(logits(model, x, visible), same)


@pytest.mark.slow
def test_a_penalty_does_what_it_is_for():
    """Left to itself heterogeneity rises in the last layer; with the penalty it falls in all."""
    X = sample(500, 0)
    visible = np.random.default_rng(0).random(X.shape) < 0.5
    settings = {
        "training": Epochs(max_epochs=12, validation_fraction=0.0, learning_rate=3e-3),
        "random_state": 0,
    }
    rise = []
    for falling in (0.0, 1.0):
        program = OptimizedMaskTransformer(16, 2, 2, **{**NOTHING, "falling": falling, "temperature": 0.02})
        mpt = BayesMPT(program, predictor=SelfPredictive(1), **settings).fit(X)
        rise.append(np.diff(program.heterogeneity(mpt.params_, X, visible)).max())
    assert rise[1] < 0 < 0.05 < rise[0]


@pytest.mark.slow
def test_it_learns_as_well():
    settings = {
        "training": Epochs(learning_rate=6e-3, validation_fraction=0.0, max_epochs=12),
        "random_state": 0,
    }
    model = BayesMPT(OptimizedMaskTransformer(24), predictor=SelfPredictive(2), **settings)
    assert 0 < gap(model.fit(sample(1500, 0))) < 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recalibrate": "no"}, "recalibrate must be"),
        ({"spatial": -1.0}, "spatial must be a number of at least 0"),
        ({"falling": "a"}, "falling must be a number of at least 0"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
    ],
)
def test_refused_settings(change, words):
    model = clone(OptimizedMaskTransformer(16)).set_params(**change)
    with pytest.raises(ValueError, match=words):
        BayesMPT(model, random_state=0).fit(sample(60, 0))


def test_the_page_gives_the_measured_figures():
    page = (ROOT / "docs" / "masked_transformer.md").read_text().splitlines()
    rows = json.loads((ROOT / "benchmarks" / "deep" / "mask_token.json").read_text())["rows"]
    for run in (row for row in rows if "variant" in row):
        figures = (
            f"{run['speed_up']:.2f} ({run['low']:.2f} to {run['high']:.2f})",
            f"{run['speed_up_cpu']:.2f}",
            f"{run['ahead']:+.2f} ({run['ahead_low']:+.2f} to {run['ahead_high']:+.2f})",
        )
        assert " | ".join(("| " + run["setting"], run["variant"], *figures)) + " |" in page
    probes = [row for row in rows if row.get("heterogeneity") and row["setting"].startswith("60 % hidden, 2")]
    for kind in ("plain", "optimized"):
        for epoch in ("1", "24"):
            found = [row["heterogeneity"][epoch] for row in probes if row["kind"] == kind]
            assert ", ".join(f"{h:.2f}" for h in np.mean(found, 0)) in " ".join(page)
