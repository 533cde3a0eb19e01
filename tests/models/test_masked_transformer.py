"""The masked transformer: what it sees, what it learns of a source of known density, and its contrastive head."""

import math

import numpy as np
import pyro
import pytest
import torch
from site_chain import STATES, TABLE, L, T, gap, log_source, logits, rows_and_masks, said, sample, shaken
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from truths import transformer_by_hand

from bayes_mpt import BayesMPT
from bayes_mpt.masks import UniformSize, one_each
from bayes_mpt.models import MaskedTransformer, contrastive_loss, masked_transformer
from bayes_mpt.models.masked_transformer import PART, _Codes, _LookedUp
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.program.sites import base
from bayes_mpt.training import Epochs

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

KINDS = [
    {},
    {"head": "contrastive"},
    {"groups": range(T), "n_levels": [3, 2, 3, 4, 3, 3]},
]


# -------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_changes_nothing(kind):
    model = MaskedTransformer(16, 2, 2, **{"n_levels": L, **kind})
    generator = torch.Generator().manual_seed(0)
    x = torch.as_tensor(sample(40, 0)).clamp(max=1)
    visible = torch.rand(x.shape, generator=generator) < 0.5
    found = logits(model, x, visible)
    for other in (x.roll(1, 0), x.flip(1), 1e6 + x, torch.full_like(x, torch.nan)):
        changed = torch.where(visible, x, other)
        assert torch.equal(logits(model, changed, visible), found)
    # what is visible does change it, and rows keep to themselves
    moved = x.clone()
    moved[:, 0] = 1 - x[:, 0]
    by_row = (logits(model, moved, visible) - found).nan_to_num(0.0)[:, 1:].abs().amax((1, 2))
    assert bool((by_row[visible[:, 0]] > 1e-4).all()) and bool((by_row[~visible[:, 0]] == 0).all())


def test_codes_that_a_column_cannot_have_get_no_probability():
    model = MaskedTransformer(16, 2, 2, groups=range(T), n_levels=[3, 2, 3, 4, 3, 3])
    x = torch.as_tensor(sample(40, 0)).clamp(max=1)
    found = logits(model, x, x == 0).exp()
    assert found.shape == (40, T, 4)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)
    assert bool((found[:, 1, 2:] == 0).all()) and bool((found[:, 0, 3] == 0).all())
    assert bool((found[:, 3] > 0).all())


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_the_network_is_the_one_written_out(own_store, in_double, n_layers):
    x, visible = rows_and_masks()
    model = MaskedTransformer(8, n_layers, 2, n_levels=L)
    params = shaken(model, x)
    with torch.no_grad():
        found = said(model, x, visible)
    expected, _, _ = transformer_by_hand(params, x.numpy(), visible.numpy(), 2, n_layers)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_training_starts_at_independent_columns():
    X = sample(300, 0)
    with pytest.warns(ConvergenceWarning):
        model = BayesMPT(
            MaskedTransformer(16), training=Epochs(max_epochs=1, learning_rate=1e-9), random_state=0
        ).fit(X)
    shares = np.stack([np.bincount(c.astype(int), minlength=L) for c in X.T]) / len(X)
    independent = (shares * np.log(shares)).sum()
    assert abs(model.score(X) - independent) < 0.03


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def fitted():
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        return {
            n: BayesMPT(
                MaskedTransformer(24),
                training=Epochs(learning_rate=6e-3, validation_fraction=0.0, max_epochs=n_epochs),
                random_state=0,
            ).fit(sample(n, 0))
            for n, n_epochs in ((300, 45), (2000, 16))
        }


@pytest.mark.slow
def test_area_lies_below_the_exact_log_likelihood_and_approaches_it(fitted):
    """In expectation, where no sampling error hides a network that knows what it cannot know."""
    few, many = gap(fitted[300]), gap(fitted[2000])
    shares = torch.stack([F.one_hot(c, L).double().T @ TABLE.exp() for c in STATES.T])  # (T, L)
    independent = -float((shares * shares.log()).sum()) + float(TABLE.exp() @ TABLE)
    assert 0 < many < 0.25  # .09 to .17 over seeds
    assert many < 0.5 * few and few < 0.5 * independent
    fresh = sample(2000, 1)  # and on rows as they come
    assert abs(log_source(torch.as_tensor(fresh)).numpy() - fitted[2000].score_samples(fresh)).mean() < 0.5


@pytest.mark.slow
def test_orders_disagree_and_it_is_told(fitted):
    fresh = sample(300, 1)
    spread = {}
    for n, model in fitted.items():
        told = model.estimate(fresh).diagnostics
        assert told["log_mean_exp"] > np.mean(told["totals"])
        spread[n] = told["order_sd"]
    assert 0 < spread[2000] < spread[300]


@pytest.mark.slow
def test_the_contrastive_head_learns_as_well():
    settings = {
        "training": Epochs(learning_rate=6e-3, validation_fraction=0.0, max_epochs=12),
        "random_state": 0,
    }
    model = BayesMPT(MaskedTransformer(24, head="contrastive"), predictor=SelfPredictive(2), **settings).fit(
        sample(1500, 0)
    )
    assert 0 < gap(model) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("head", ["softmax", "contrastive"])
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_missing_cells_and_columns_with_other_levels(head):
    """A column of two levels, one of five, each its own codes; the second tells the first."""
    rng = np.random.default_rng(0)
    five = rng.integers(5, size=1500)
    X = np.stack([five >= 3, five, rng.integers(3, size=1500)], 1).astype(float)
    whole = X.copy()
    X[rng.random(X.shape) < 0.2] = np.nan
    model = BayesMPT(
        MaskedTransformer(16, 1, 2, groups=range(3), n_levels=(2, 5, 3), head=head),
        training=Epochs(learning_rate=1e-2, max_epochs=20),
        predictor=SelfPredictive(2),
        random_state=0,
    ).fit(X)
    filled = model.impute(X)
    told = np.isnan(X[:, 0]) & ~np.isnan(X[:, 1])
    assert (filled[~np.isnan(X)] == X[~np.isnan(X)]).all()
    assert (filled[told, 0] == whole[told, 0]).mean() > 0.99
    # -log p: the entropy of five levels and of three, the first column being known
    assert abs(model.score(whole) + math.log(15)) < 0.1
    # of a row without a cell nothing is scored
    assert model.score_samples(np.full((1, 3), np.nan))[0] == 0.0


@pytest.mark.slow
def test_resumes_to_the_bit(tmp_path):
    X = sample(300, 0)
    settings = {"random_state": 3}
    file = tmp_path / "training.pt"
    with pytest.warns(ConvergenceWarning):
        whole = BayesMPT(
            MaskedTransformer(16), training=Epochs(max_epochs=4, learning_rate=3e-3), **settings
        ).fit(X)
    with pytest.warns(ConvergenceWarning):
        BayesMPT(
            MaskedTransformer(16),
            training=Epochs(max_epochs=2, learning_rate=3e-3, checkpoint=file),
            **settings,
        ).fit(X)
    with pytest.warns(ConvergenceWarning):
        resumed = BayesMPT(
            MaskedTransformer(16),
            training=Epochs(max_epochs=4, learning_rate=3e-3, checkpoint=file),
            **settings,
        ).fit(X)
    assert resumed.history_ == whole.history_
    assert all((resumed.params_[k] == whole.params_[k]).all() for k in whole.params_)
    assert all(v.dtype == np.float32 for v in whole.params_.values())


def test_a_checkpoint_is_of_one_training_on_its_rows(tmp_path):
    """Folds of a cross-validation would be scored after a training on all rows, further starts be the first again."""
    file = tmp_path / "training.pt"
    settings = {"training": Epochs(max_epochs=1, validation_fraction=0.0, checkpoint=file), "random_state": 3}
    BayesMPT(MaskedTransformer(16), **settings).fit(sample(300, 0))
    with pytest.raises(ValueError, match="other rows"):
        BayesMPT(MaskedTransformer(16), **settings).fit(sample(300, 0)[:200])
    with pytest.raises(ValueError, match="n_init=2"):
        BayesMPT(MaskedTransformer(16), n_init=2, **settings).fit(sample(300, 0))


def test_a_column_of_one_level_may_be_missing():
    X = np.column_stack([sample(300, 0), np.zeros(300)])
    settings = {"training": Epochs(max_epochs=1, validation_fraction=0.0), "random_state": 0}
    model = BayesMPT(MaskedTransformer(16, n_levels=[L] * T + [1]), **settings).fit(X)
    assert (model.sample(20)[:, T] == 0).all()
    without = np.where(np.arange(T + 1) == T, np.nan, X[:5])
    np.testing.assert_array_equal(model.impute(without), X[:5])
    assert np.isfinite(model.score_samples(without)).all()


# --------------------------------------------------------------------------------------------------- contrastive head


def test_contrastive_loss_is_the_cross_entropy_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    out, embedding = torch.randn(2, 70, 16, generator=generator)
    embedding[3] = embedding[5]  # a repeated token stays a negative
    expected = F.cross_entropy(out @ embedding.T, torch.arange(70))
    assert abs(float(contrastive_loss(out, embedding) - expected)) < 1e-6
    huge = contrastive_loss(1e3 * out, embedding)  # exp would overflow
    assert bool(torch.isfinite(huge))
    wide = (1e3 * out).double() @ embedding.double().T
    np.testing.assert_allclose(huge, F.cross_entropy(wide, torch.arange(70)), rtol=1e-6)


def test_in_training_the_head_has_the_contrastive_loss():
    """Minus its log-densities, less those of the code's frequency, is the loss over all hidden cells, less log K."""
    model = MaskedTransformer(16, 1, 2, head="contrastive", groups=[0, 0, 0, 1, 1, 1])
    x = torch.as_tensor(sample(30, 0))
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        fn = base(pyro.poutine.trace(model).get_trace(x, visible).nodes["x"]["fn"])
        store = pyro.get_param_store()
        group = torch.tensor([0, 0, 0, 1, 1, 1])
        log_q = store["unigram"].flatten().log_softmax(0).reshape(2, L)[group, x.long()]
        states = fn.states
        expected = contrastive_loss(states[~visible], store["embedding"][group, x.long()][~visible])
        k = int((~visible).sum())
        got = -(fn.log_prob(x) - log_q)[~visible].mean() + math.log(k)
        assert abs(float((got - expected).detach())) < 1e-5
        with torch.no_grad():  # read out: a density of its own
            each = torch.stack([fn.log_prob(torch.full_like(x, a)) for a in range(L)])
            np.testing.assert_allclose(each.exp().sum(0)[~visible], 1.0, atol=1e-5)


N_LEVELS = torch.tensor([5, 3, 4, 5, 2, 5])
GROUP = torch.tensor([1, 0, 0, 1, 0, 1])


def codes_of(contrastive, seed=0):
    """What is said of 20 rows in double precision, the truth, what is hidden, and the leaves."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 if contrastive else T, 5)
    leaves = [torch.randn(s, generator=generator).double() for s in ((20, T, 8), (2, 5, 8), shape)]
    hidden = torch.rand(20, T, generator=generator) < 0.6
    x = (torch.rand(20, T, generator=generator).double() * N_LEVELS).floor()
    for leaf in leaves:
        leaf.requires_grad_()
    h, e, b = leaves
    table = _LookedUp.apply(e.flatten(0, 1))
    return _Codes(h, table, b, GROUP, N_LEVELS, hidden, contrastive), x, hidden, leaves


@pytest.mark.slow
@pytest.mark.parametrize("contrastive", [False, True])
def test_draws_follow_the_read_out(contrastive):
    """A cell is drawn anew 1500 times; and through the estimator, missing cells alone."""
    fn, *_ = codes_of(contrastive)
    n = 1500
    with torch.no_grad(), torch.random.fork_rng():
        drawn = torch.stack([fn.sample() for _ in range(n)])
        share = F.one_hot(drawn, 5).double().mean(0)  # (20, T, 5)
        p = fn.logits.exp()
    z = (share - p) / (p * (1 - p) / n).sqrt().clamp(min=1e-9)
    assert float(z.abs().max()) < 5 and bool((share[p == 0] == 0).all())


@pytest.mark.slow
def test_fills_holes_and_makes_rows(fitted):
    x = sample(20, 4)
    holes = np.where(np.random.default_rng(0).random(x.shape) < 0.3, np.nan, x)
    filled = fitted[2000].sample_missing(holes, n_samples=3)
    made = fitted[2000].sample(2000)
    assert np.isin(filled, range(L)).all() and np.isin(made, range(L)).all()
    np.testing.assert_array_equal(filled[:, ~np.isnan(holes)], np.repeat(x[~np.isnan(holes)][None], 3, 0))
    # neighbours of the source are alike far more often than by chance, and so are those of made-up rows
    alike = lambda rows: float((np.diff(rows, axis=1) == 0).mean())  # noqa: E731
    assert abs(alike(made) - alike(sample(20000, 5))) < 0.05


@pytest.mark.parametrize("part", [PART, 7])
@pytest.mark.parametrize("contrastive", [False, True])
def test_reads_out_what_brute_force_says(contrastive, part, monkeypatch):
    monkeypatch.setattr(masked_transformer, "PART", part)
    fn, x, hidden, (h, e, b) = codes_of(contrastive)
    expected = torch.zeros(20, T).double()
    logits = torch.full((20, T, 5), -torch.inf).double()
    for n in range(20):
        for t in range(T):
            bias = b[GROUP[t] if contrastive else t]
            own = torch.stack([h[n, t] @ e[GROUP[t], a] + bias[a] for a in range(N_LEVELS[t])])
            expected[n, t] = own[int(x[n, t])] - own.logsumexp(0)
            logits[n, t, : len(own)] = own.detach()
    with torch.set_grad_enabled(not contrastive):
        found = fn.log_prob(x)
        np.testing.assert_allclose(found.detach(), torch.where(hidden, expected, 0.0).detach(), atol=1e-12)
        np.testing.assert_allclose(fn.logits.detach(), logits.log_softmax(-1), atol=1e-12)
        assert torch.equal(fn.mode, logits.argmax(-1)) and bool(fn.mean.isnan().all())
    if not contrastive:
        wanted = torch.autograd.grad(expected[hidden].sum(), (h, e, b))
        for got, grad in zip(torch.autograd.grad(found.sum(), (h, e, b)), wanted, strict=True):
            np.testing.assert_allclose(got, grad, atol=1e-12)


@pytest.mark.parametrize("part", [PART, 7])
def test_trains_on_all_pairs_of_hidden_cells(part, monkeypatch):
    """Values and gradients are those of the cross-entropy of K x K logits; missing cells are not among them."""
    monkeypatch.setattr(masked_transformer, "PART", part)
    fn, x, hidden, leaves = codes_of(True)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = torch.nan
    there = hidden & ~x.isnan()
    h, e, b = leaves
    code = x[there].long()
    group = GROUP.expand_as(x)[there]
    k = len(code)
    pairs = h[there] @ e[group, code].mT  # (K, K)
    log_q = b.flatten().log_softmax(0).reshape(2, 5)[group, code]
    wanted = log_q + math.log(k) - F.cross_entropy(pairs, torch.arange(k), reduction="none")
    found = fn.log_prob(x)
    assert bool((found[~there] == 0).all())
    np.testing.assert_allclose(found[there].detach(), wanted.detach(), atol=1e-12)
    weight = torch.rand(k, generator=torch.Generator().manual_seed(2)).double()
    theirs = torch.autograd.grad(weight @ wanted, leaves)
    for got, grad in zip(torch.autograd.grad(weight @ found[there], leaves), theirs, strict=True):
        np.testing.assert_allclose(got, grad, atol=1e-12)
    nothing = fn.log_prob(torch.full_like(x, torch.nan))
    assert bool((nothing == 0).all()) and nothing.requires_grad


def test_missing_cells_are_no_negatives():
    """The score of a table with empty cells is that of the hidden cells that it has."""
    x = torch.as_tensor(sample(40, 0))
    model = MaskedTransformer(16, 1, 2, n_levels=L, head="contrastive")
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        predictor = SelfPredictive().bind(model, (x,))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = torch.nan
        visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        found = predictor.read((x,)).conditionals(visible[None])[0]
        fn = base(pyro.poutine.trace(model).get_trace(x.nan_to_num(0), visible & ~x.isnan()).nodes["x"]["fn"])
        there = ~visible & ~x.isnan()
        code = x[there].long()
        expected = contrastive_loss(fn.states[there], pyro.param("embedding")[0, code])
        log_q = pyro.param("unigram")[0].log_softmax(0)[code]
        got = -(found[there] - log_q).mean() + math.log(len(code))
        assert abs(float((got - expected).detach())) < 1e-5
        assert bool((found[~there] == 0).all())


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and not t.is_sparse:  # whose values are dense tensors
                self.n = max(self.n, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_a_step_holds_no_logits_of_the_vocabulary(monkeypatch):
    """The contrastive head has nothing larger than the embeddings; the softmax head a part of its logits."""
    n, n_codes, width = 32, 3000, 8
    x = torch.randint(n_codes, (n, T), generator=torch.Generator().manual_seed(0)).float()
    visible = torch.rand(n, T, generator=torch.Generator().manual_seed(1)) < 0.5
    k, table = int((~visible).sum()), n_codes * width
    assert k * n_codes > 5 * table

    def largest(head, read_out=False):
        model = MaskedTransformer(width, 1, 2, n_levels=n_codes, head=head)
        with pyro.get_param_store().scope(), torch.random.fork_rng():
            predictor = SelfPredictive().bind(model, (x,))
            with Largest() as mode, torch.set_grad_enabled(not read_out):
                score = predictor.read((x,)).conditionals(visible[None]).sum()
                if not read_out:
                    score.backward()
        return mode.n

    assert largest("contrastive") == table
    assert largest("softmax") == k * n_codes
    monkeypatch.setattr(masked_transformer, "PART", 5 * n_codes)
    assert largest("softmax") == table
    assert largest("contrastive", read_out=True) == table


@pytest.mark.slow
def test_read_out_needs_the_frequencies():
    """Contexts with known conditionals: e'h plus the log frequencies comes to the entropy, e'h alone does not."""
    generator = torch.Generator().manual_seed(0)
    n_contexts, n_words = 6, 30
    words = (1.5 * torch.randn(n_words, generator=generator)).double()  # some are frequent
    given = (words + torch.randn(n_contexts, n_words, generator=generator).double()).softmax(1)
    entropy = -float((given * given.log()).sum(1).mean())
    n = 8000
    context = torch.randint(n_contexts, (n,), generator=generator)
    word = torch.multinomial(given[context], 1, generator=generator)[:, 0]
    X = torch.stack([context, word], 1).numpy().astype(np.float32)
    missed = {}
    for head in ("softmax", "contrastive"):
        program = MaskedTransformer(16, 1, 2, groups=range(2), n_levels=(n_contexts, n_words), head=head)
        settings = {
            "training": Epochs(batch_size=400, learning_rate=1e-2, max_epochs=12, validation_fraction=0.0)
        }
        model = BayesMPT(program, predictor=SelfPredictive(1), random_state=0, **settings).fit(X)
        rows = torch.stack([torch.arange(n_contexts), torch.zeros(n_contexts)], 1)
        with model.read_rows(rows.numpy()) as _, torch.no_grad():
            for name in (head, "e'h alone")[: 1 + (head == "contrastive")]:
                if name == "e'h alone":
                    pyro.param("unigram").zero_()
                log_p = said(model.fitted_model_, rows, torch.tensor([True, False]).expand(6, 2))[:, 1]
                missed[name] = -float((given * log_p).sum(1).mean()) - entropy
    # 6 x 29 free parameters learnt from n rows cost 0.011 nats at best
    assert 0 < missed["softmax"] < 0.04 and 0 < missed["contrastive"] < 0.04
    assert missed["e'h alone"] > 0.2


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("head", ["softmax", "contrastive"])
def test_refuses_a_vocabulary_larger_than_memory(head):
    model = MaskedTransformer(64, n_levels=10**9, head=head)
    with pytest.raises(ValueError, match=r"of 1000000000 codes take \S+ GiB in training, this device has"):
        BayesMPT(model).fit(sample(60, 0))


def test_refuses_hidden_codes_out_of_range():
    x = torch.as_tensor(sample(40, 0))
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        predictor = SelfPredictive().bind(MaskedTransformer(16, 1, 2), (x,))
        x[3, 1] = L
        with pytest.raises(ValueError, match="column 1 must hold codes 0, ..., 2, got 3"):
            predictor.read((x,)).conditionals(
                torch.zeros_like(x, dtype=torch.bool)[None, :1].expand(1, 40, T)
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 0}, "width must be an integer"),
        ({"n_layers": 1.5}, "n_layers must be an integer"),
        ({"n_heads": 5}, "multiple of n_heads"),
        ({"head": "none"}, "head must be one of"),
        ({"groups": [0, 1]}, "one group for each of 6 columns"),
        ({"n_levels": [3, 3]}, "one for each of 6 columns"),
        ({"n_levels": 0}, "n_levels must be an integer"),
        ({"n_levels": 2}, r"column \d must hold codes 0, ..., 1, got 2"),
        ({"n_levels": [3, 3, 3, 2, 3, 3]}, r"column 3 must hold codes 0, ..., 1, got 2"),
    ],
)
def test_refused_settings(change, words):
    model = clone(MaskedTransformer(16)).set_params(**change)
    with pytest.raises(ValueError, match=words):
        BayesMPT(model, random_state=0).fit(sample(60, 0))


@pytest.mark.parametrize(
    ("cell", "words"),
    [(-1.0, "column 2 must hold codes"), (0.5, "column 2 must hold codes"), (1e6, "column 2 holds 1e")],
)
def test_refused_cells(cell, words):
    X = sample(60, 0)
    X[7, 2] = cell
    with pytest.raises(ValueError, match=words):
        BayesMPT(MaskedTransformer(16), random_state=0).fit(X)


@pytest.mark.slow
def test_refused_rows(fitted):
    model = fitted[300]
    X = sample(20, 2)
    X[4, 1] = L
    with pytest.raises(ValueError, match="column 1 must hold codes 0, ..., 2, got 3"):
        model.score(X)
    with pytest.raises(ValueError, match="0 sample"):
        model.score(np.empty((0, T)))
    with pytest.raises(ValueError, match="0 sample|minimum of 2"):
        BayesMPT(MaskedTransformer(16)).fit(np.empty((0, T)))
    with pytest.raises(ValueError, match="features"):
        model.score(X[:, :3])


def test_one_mask_a_row_is_what_it_is_trained_on():
    """A step of training is one run of the network, each row under its own mask."""
    seen = []

    class Spy(MaskedTransformer):
        def __call__(self, x, visible):
            if torch.is_grad_enabled() and not bool(visible.all()):
                seen.append(visible)
            super().__call__(x, visible)

    with pytest.warns(ConvergenceWarning):
        BayesMPT(
            Spy(16, 1, 2), training=Epochs(max_epochs=1), random_state=0, predictor=SelfPredictive(1)
        ).fit(sample(256, 0))
    assert len(one_each(UniformSize(64).draw(T, 0), 128, 0).visible) == 1
    assert all(len(v) <= 128 for v in seen) and len(seen[0].unique(dim=0)) > 5
