"""Potts models and factored attention against enumeration of all states."""

import numpy as np
import pyro
import pytest
import torch
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from truths import every_row

from bayes_mpt import BayesMPT
from bayes_mpt.masks import LeaveOneOut, Masks
from bayes_mpt.models import Couplings, FactoredAttention, Potts
from bayes_mpt.predictors import SelfPredictive, choose
from bayes_mpt.training import Ascent, Steps

pytestmark = pytest.mark.usefixtures("own_store")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def separable(n_sites, n_levels, seed, n_products=1):
    """A teacher with couplings sum_k J_ij U_ab."""
    w = torch.zeros(n_sites, n_levels, n_sites, n_levels, dtype=torch.float64)
    for k in range(n_products):
        j = normal(n_sites, n_sites, seed=10 * seed + 2 * k).triu(1)
        u = normal(n_levels, n_levels, seed=10 * seed + 2 * k + 1)
        u = u + u.T
        u = u - u.mean(0) - u.mean(1, keepdim=True) + u.mean()
        w += (j + j.T)[:, None, :, None] * u[:, None, :] / n_sites**0.5
    return Couplings(torch.zeros(n_sites, n_levels, dtype=torch.float64), w)


def general(n_sites, n_levels, seed, reach=None):
    """Couplings without any form, between sites no more than ``reach`` apart."""
    w = 0.7 * normal(n_sites, n_levels, n_sites, n_levels, seed=seed)
    apart = (torch.arange(n_sites)[:, None] - torch.arange(n_sites)).abs()
    w = w * ((apart > 0) & (apart <= (reach or n_sites)))[:, None, :, None]
    return Couplings(normal(n_sites, n_levels, seed=seed + 1), w + w.permute(2, 3, 0, 1))


def log_weights(form, x):
    """sum_i h_i + sum_{i<j} W_ij, in loops."""
    h, w = form.field.numpy(), form.coupling.numpy()
    return np.array(
        [
            sum(h[i, a] for i, a in enumerate(row))
            + sum(w[i, row[i], j, row[j]] for i in range(len(row)) for j in range(i))
            for row in x.tolist()
        ]
    )


def rows(form, n, seed):
    return form.sample(n, 1, n_warmup=60, random_state=seed).x[:, 0].astype(float)


def set_params(**values):
    for name, value in values.items():
        pyro.param(name, value.clone())


# ------------------------------------------------------------------------------------------------------ the density


@pytest.mark.parametrize("form", [general(4, 3, 0), general(7, 2, 1, reach=2), general(5, 3, 2, reach=1)])
def test_log_partition_is_the_sum_over_all_states(form):
    weights = log_weights(form, torch.from_numpy(every_row(*form.field.shape)))
    expected = np.logaddexp.reduce(weights)
    assert abs(float(form.log_partition()) - expected) < 1e-9
    x = torch.from_numpy(every_row(*form.field.shape))[::5]
    np.testing.assert_allclose(form.log_prob(x), log_weights(form, x) - expected, atol=1e-10)


def test_log_partition_of_independent_sites_and_of_a_long_chain():
    free = general(200, 3, 3)._replace(coupling=torch.zeros(200, 3, 200, 3, dtype=torch.float64))
    assert abs(float(free.log_partition()) - float(free.field.logsumexp(1).sum())) < 1e-9
    chain = general(200, 3, 3, reach=1)
    table = chain.field[0]  # transfer matrices
    for i in range(1, 200):
        table = (table[:, None] + chain.coupling[i - 1, :, i]).logsumexp(0) + chain.field[i]
    assert abs(float(chain.log_partition()) - float(table.logsumexp(0))) < 1e-9


def test_annealing_finds_the_log_partition_within_its_error():
    form = general(6, 3, 4)
    found = form.annealed_log_partition(400, 300)
    assert 0 < found.se < 0.1
    assert abs(found.value - float(form.log_partition())) < 3 * found.se
    with pytest.raises(ValueError, match="annealed_log_partition"):
        form.log_partition(max_states=100)


def test_gibbs_marginals():
    form = general(5, 3, 5)
    x = torch.from_numpy(every_row(5, 3))
    prob = form.log_prob(x).exp()
    pairs = torch.nn.functional.one_hot(x, 3).double().flatten(1)
    expected = pairs.T @ (prob[:, None] * pairs)
    found = form.sample(16, 1000, n_warmup=100)
    drawn = torch.nn.functional.one_hot(torch.as_tensor(found.x), 3).double().flatten(2).flatten(0, 1)
    sd = (expected * (1 - expected) / found.ess).sqrt()
    assert found.r_hat < 1.01 and found.ess > 1000
    assert bool(((drawn.T @ drawn / len(drawn) - expected).abs() < 4.5 * sd + 1e-3).all())


def test_chains_that_do_not_mix_are_told():
    stuck = Couplings(
        torch.zeros(6, 2, dtype=torch.float64),
        4.0 * (torch.ones(6, 6) - torch.eye(6)).double()[:, None, :, None] * torch.eye(2).double()[:, None],
    )
    assert stuck.sample(4, 100).r_hat > 1.5


def test_zero_sum_gauge_is_the_same_density():
    form = general(4, 3, 6)
    gauged = form.zero_sum()
    x = torch.from_numpy(every_row(4, 3))
    np.testing.assert_allclose(gauged.log_prob(x), form.log_prob(x), atol=1e-12)
    for axis in (1, 3):
        assert float(gauged.coupling.sum(axis).abs().max()) < 1e-12
    f = gauged.coupling.square().sum((1, 3)).sqrt().numpy()
    mean = lambda a: a.sum() / (a.size - len(a))  # noqa: E731  # off the diagonal
    corrected = form.contact_map().numpy()
    for i, j in ((0, 1), (2, 3)):
        expected = f[i, j] - f[i].sum() / 3 * f[j].sum() / 3 / mean(f)
        assert abs(corrected[i, j] - expected) < 1e-12


# --------------------------------------------------------------------------------------------------- the conditionals


def pseudo_likelihood(h, w, x):
    """sum_i log p(x_i | all others) of each row, in loops; w may be directed."""
    out = []
    for row in x.astype(int):
        total = 0.0
        for i in range(len(row)):
            logits = h[i] + sum(w[i, :, j, row[j]] for j in range(len(row)) if j != i)
            total += logits[row[i]] - np.logaddexp.reduce(logits)
        out.append(total)
    return np.array(out)


@pytest.mark.parametrize("n_heads", [1, 2, 5])  # by factors, and whole
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("head_size", [None, 2])
def test_one_hidden_site_gives_the_pseudo_likelihood(n_heads, softmax, head_size):
    n_sites, n_levels = 5, 3
    scores = normal(n_heads, n_sites, n_sites, seed=0)
    value, field = normal(n_heads, n_levels, n_levels, seed=1), normal(n_sites, n_levels, seed=2)
    if head_size is None:
        set_params(attention=scores)
    else:
        query, key = (normal(n_heads, n_sites, head_size, seed=s) for s in (3, 4))
        set_params(query=query, key=key)
        scores = query @ key.mT / head_size**0.5
    set_params(value=value, field=field)
    a = scores.numpy().copy()
    for head in a:
        np.fill_diagonal(head, -np.inf if softmax else 0.0)
    if softmax:
        a = np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    w = np.einsum("hij,hab->iajb", a, value.numpy())
    x = np.random.default_rng(0).integers(n_levels, size=(20, n_sites)).astype(float)
    x[:n_levels] = np.arange(n_levels)[:, None]
    rows = torch.as_tensor(x)
    found = choose(FactoredAttention(n_heads, head_size, softmax), (rows,)).read((rows,))
    assert found.blind
    score = found.score(LeaveOneOut().draw(n_sites)).detach()
    np.testing.assert_allclose(score, pseudo_likelihood(field.numpy(), w, x), atol=1e-10)


def test_factored_attention_is_the_potts_model_where_its_factors_are():
    n_sites, n_levels, beta = 5, 3, 0.6
    j = normal(n_sites, n_sites, seed=0)
    j = (j + j.T).fill_diagonal_(0.0)
    u = normal(n_levels, n_levels, seed=1)
    u = u + u.T
    truth = Couplings(
        torch.zeros(n_sites, n_levels, dtype=torch.float64), beta * j[:, None, :, None] * u[:, None, :]
    )
    set_params(attention=j[None], value=beta * u[None])
    x = torch.from_numpy(every_row(n_sites, n_levels)).double()
    program = FactoredAttention(softmax=False, field=False)
    found = choose(program, (x,)).read((x,))
    each = ~torch.eye(n_sites, dtype=torch.bool)
    got = found.conditionals(each).diagonal(dim1=0, dim2=2).detach()
    log_p = truth.log_prob(x).reshape([n_levels] * n_sites)
    exact = torch.stack([(log_p - log_p.logsumexp(i, keepdim=True)).flatten() for i in range(n_sites)], 1)
    np.testing.assert_allclose(got, exact, atol=1e-10)
    # and what is read out of it is that density
    read_out = program.couplings({"attention": j[None], "value": beta * u[None]})
    np.testing.assert_allclose(read_out.log_prob(x), truth.log_prob(x), atol=1e-10)


def test_directed_couplings_are_read_out_with_their_fields():
    """What a directed coupling says of one site alone is a field of that site, and is not halved."""
    attention = normal(1, 4, 4, seed=0)
    value = normal(3, 1, seed=1).expand(1, 3, 3)  # the same whatever the other site has
    form = FactoredAttention(softmax=False, field=False).couplings({"attention": attention, "value": value})
    off = attention[0] * ~torch.eye(4, dtype=torch.bool)
    expected = off.sum(1)[:, None] * value[0, :, 0]
    np.testing.assert_allclose(form.field, expected - expected.mean(1, keepdim=True), atol=1e-12)
    assert float(form.coupling.abs().max()) < 1e-12


@pytest.mark.parametrize("separably", [False, True])
def test_potts_conditionals_are_exact_for_any_mask(separably):
    form = separable(5, 3, 1) if separably else general(5, 3, 7)
    if separably:
        sites, levels = normal(5, 5, seed=20), normal(3, 3, seed=21)
        set_params(sites=sites, levels=levels, field=form.field)
    else:
        set_params(coupling=form.coupling, field=form.field)
    x = torch.from_numpy(every_row(5, 3)).double()[
        torch.randperm(243, generator=torch.Generator().manual_seed(0))[:30]
    ]
    x[0] = 2.0
    program = Potts(separable=separably)
    found = choose(program, (x,)).read((x,))
    if separably:
        form = program.couplings({"sites": sites, "levels": levels, "field": form.field})
    log_p = form.log_prob(torch.from_numpy(every_row(5, 3))).reshape(3, 3, 3, 3, 3)
    visible = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[0] = False
    got = found.conditionals(visible).detach()
    for s, shown in enumerate(visible.tolist()):
        for n, row in enumerate(x.long().tolist()):
            part = log_p[tuple(a if v else slice(None) for a, v in zip(row, shown, strict=True))]
            hidden = [i for i, v in enumerate(shown) if not v]
            for axis, i in enumerate(hidden):
                others = [k for k in range(len(hidden)) if k != axis]
                alone = (part.logsumexp(others) if others else part).log_softmax(0)[row[i]]
                assert abs(float(got[s, n, i] - alone)) < 1e-10
    # so any order adds up to the joint density
    np.testing.assert_allclose(found.score().detach(), form.log_prob(x), atol=1e-10)
    evidence = found.evidence()
    assert evidence.diagnostics["order_sd"] < 1e-12


def test_mean_field_takes_over_where_states_are_many():
    """Its error is of second order in the couplings; whatever it says, each order's density is normalised."""
    weak, x, worst = general(5, 3, 8), torch.from_numpy(every_row(5, 3)).double(), []
    masks = torch.arange(5) >= torch.tensor([[2], [4]])
    for size in (0.02, 0.04):
        with pyro.get_param_store().scope():
            set_params(coupling=size * weak.coupling, field=weak.field)
            found, exact = (choose(Potts(max_states=m), (x,)).read((x,)) for m in (9, 4096))
            got, truth = (p.at(x).conditionals(masks).detach() for p in (found, exact))
            np.testing.assert_allclose(got[0], truth[0], atol=1e-10)  # two sites: nine states
            worst.append(float((got[1] - truth[1]).abs().max()))
            total = found.chain(torch.arange(5)[None])[0].sum(1).logsumexp(0)
            assert abs(float(total.detach())) < 1e-10
    assert 3.5 < worst[1] / worst[0] < 4.5


# --------------------------------------------------------------------------------------------------------- training


def test_fit_on_leave_one_out_is_the_maximum_of_the_pseudo_likelihood():
    truth = general(3, 2, 9)
    x = rows(truth, 400, 0)
    est = BayesMPT(Potts(), masks=LeaveOneOut(), random_state=0).fit(x)
    assert est.converged_ and est.fit_method_ == "lbfgs"

    def loss(theta):
        h, w = theta[:6].reshape(3, 2), theta[6:].reshape(3, 2, 3, 2)
        w = 0.5 * (w + w.transpose(2, 3, 0, 1))
        return -pseudo_likelihood(h, w, unique).dot(count) / len(x)

    unique, count = np.unique(x, axis=0, return_counts=True)
    best = minimize(loss, np.zeros(42), tol=1e-12).fun
    form = Potts().couplings(est.params_)
    got = -pseudo_likelihood(form.field.numpy(), form.coupling.numpy(), unique).dot(count) / len(x)
    assert abs(got - best) < 1e-7
    assert abs(est.score(x) - float(form.log_prob(x).mean())) < 1e-9  # its conditionals fit one joint density


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_training_on_all_masks_comes_near_the_maximum_of_the_likelihood():
    truth = general(3, 2, 11)
    x = rows(truth, 500, 1)
    est = BayesMPT(Potts(), training=Steps(batch_size=100, max_iter=300), random_state=0).fit(x)
    assert est.fit_method_ == "adam"
    codes = torch.as_tensor(x).long()

    def loss(theta):
        theta = torch.as_tensor(theta).requires_grad_()
        w = theta[6:].reshape(3, 2, 3, 2)
        w = (w + w.permute(2, 3, 0, 1)) * ~torch.eye(3, dtype=torch.bool)[:, None, :, None]
        value = -Couplings(theta[:6].reshape(3, 2), w).log_prob(codes).mean()
        return float(value.detach()), torch.autograd.grad(value, theta)[0].numpy()

    best = -minimize(loss, np.zeros(42), jac=True, tol=1e-12).fun
    assert best - 2e-3 < est.score(x) <= best + 1e-9


def error(program, form, x, **settings):
    est = BayesMPT(
        program, masks=LeaveOneOut(), predictor=SelfPredictive(n_orders=1), random_state=0, **settings
    ).fit(x)
    w, true = program.couplings(est.params_).coupling, form.zero_sum().coupling
    return float((w - true).square().sum() / true.square().sum())


@pytest.mark.slow
def test_error_of_the_couplings_falls_with_the_rows():
    sizes, errors = (250, 800, 2500), []
    for seed in range(2):
        form = separable(6, 3, seed)
        x = rows(form, max(sizes), seed)
        program = FactoredAttention(softmax=False, field=False)
        errors.append([error(program, form, x[:n], n_init=2) for n in sizes])
    slope = np.polyfit(np.log(sizes), np.log(errors).mean(0), 1)[0]
    assert abs(slope + 1) < 0.15
    assert np.max(errors, 0)[-1] < 0.02


@pytest.mark.slow
def test_a_sum_of_two_products_needs_two_heads():
    form = separable(6, 3, 5, n_products=2)
    x = rows(form, 2500, 3)
    one, two = (error(FactoredAttention(h, softmax=False, field=False), form, x, n_init=2) for h in (1, 2))
    assert one > 0.1 and two < 0.03


def test_penalty_holds_couplings_that_rows_do_not():
    x = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]] * 5)
    with pytest.warns(ConvergenceWarning):  # two columns are equal: their coupling diverges
        free = BayesMPT(Potts(), masks=LeaveOneOut(), random_state=0).fit(x)
    held = BayesMPT(Potts(), masks=LeaveOneOut(), penalty=True, random_state=0).fit(x)
    norms = [Potts().couplings(e.params_).contact_map(corrected=False)[0, 1] for e in (free, held)]
    assert held.converged_ and norms[1] < 5 < norms[0]


def test_errors_name_what_is_wrong():
    x = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="n_levels must be an integer"):
        choose(Potts(n_levels=0), (x,))
    est = BayesMPT(Potts(), masks=LeaveOneOut(), penalty=True).fit(np.eye(4)[:, :3])
    with pytest.raises(ValueError, match=r"level 2, .* has 2 of them"):
        est.score_samples(np.array([[0.0, 2.0, 1.0]]))


def test_masks_of_each_row():
    form = general(4, 3, 12)
    set_params(coupling=form.coupling, field=form.field)
    x = torch.from_numpy(every_row(4, 3)).double()
    found = choose(Potts(), (x,)).read((x,))
    own = torch.rand(1, len(x), 4, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = torch.rand(1, len(x), 4, generator=torch.Generator().manual_seed(1)).double() * ~own
    together = found.score(Masks(own, None, weight)).detach()
    for n in range(0, len(x), 7):
        alone = found.at(x[n : n + 1]).conditionals(own[0, n : n + 1])[0, 0].detach()
        assert abs(float(together[n] - alone @ weight[0, n])) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [Potts(), Potts(n_levels=3), Potts(separable=True), FactoredAttention()], ids=repr
)
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.filterwarnings("ignore:the estimate of parameter")
def test_missing_cells_against_enumeration(program, penalty):
    """They are summed out of what a fitted Potts model says, and out of the pseudo-likelihood that trains it."""
    x = rows(general(3, 3, 5), 60, 6)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(7)).numpy() < 0.15] = np.nan
    model = BayesMPT(
        program, masks=LeaveOneOut(), penalty=penalty, random_state=0, training=Ascent(tol=1e-6)
    ).fit(x)
    assert not model.complete_
    if isinstance(program, FactoredAttention):  # hidden tokens add nothing: no joint density to compare with
        assert np.isfinite(model.score(x))
        return
    form = program.couplings(model.params_)
    every = torch.from_numpy(every_row(3, 3))
    weight = log_weights(form, every)

    def log_share(row, given):
        """log p of the observed cells of a row, given some of them."""

        def total(cells):
            fits = [(every[:, i].numpy() == row[i]) | (i not in cells) for i in range(3)]
            return np.logaddexp.reduce(weight[np.logical_and.reduce(fits)])

        return total(set(np.flatnonzero(~np.isnan(row)))) - total(given)

    np.testing.assert_allclose(
        model.score_samples(x), [log_share(row, set()) for row in x], rtol=0, atol=1e-10
    )
    if not penalty:
        pseudo = [
            log_share(row, set(np.flatnonzero(~np.isnan(row))) - {i})
            for row in x
            for i in np.flatnonzero(~np.isnan(row))
        ]
        assert model.history_[-1] == pytest.approx(sum(pseudo) / len(x), abs=1e-10)
    observed = ~np.isnan(x)
    loc = program.hyperprior(torch.as_tensor(x))["field"][0].numpy()
    count = np.stack([(x == level).sum(0) for level in range(3)], 1)  # NaN is no level
    np.testing.assert_allclose(loc, np.log((count + 1 / 3) / (observed.sum(0)[:, None] + 1)), rtol=1e-12)


@pytest.mark.parametrize("program", [Potts(), FactoredAttention()], ids=repr)
@pytest.mark.parametrize(("cell", "words"), [(-1.0, "got -1"), (0.5, "got 0.5|support")])
def test_cells_that_are_no_levels(program, cell, words):
    x = rows(general(3, 3, 5), 20, 6)
    x[4, 1] = cell
    with pytest.raises(ValueError, match=words):
        BayesMPT(program, masks=LeaveOneOut()).fit(x)
