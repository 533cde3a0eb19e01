"""Images as patches: where pixels go, what is said of them, and what is learnt of sources of known density."""

import math
from itertools import combinations, permutations

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch.func import functional_call
from torch.nn import functional as F
from truths import every_row

from bayes_mpt import BayesMPT
from bayes_mpt.masks import Blocks, EverySize, FixedRate, Masks, PermutationChain, UniformSize
from bayes_mpt.models import MaskedPatches
from bayes_mpt.models.patches import MIN_SCALE, _Net, _Transformer
from bayes_mpt.predictors import SelfPredictive
from bayes_mpt.program.sites import base
from bayes_mpt.score import estimate
from bayes_mpt.training import Epochs

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SHAPE, PATCH = (2, 6), 2  # three patches of four pixels
T, P = 12, 3
PROGRAM = MaskedPatches(SHAPE, PATCH, 16, 1, 2)
LABEL = PROGRAM.patches
KINDS = [{}, {"likelihood": "categorical", "n_levels": 3}, {"likelihood": "gaussian"}]


# A source whose patches are states of one Markov chain: pixel k of a patch tells that of the next. Given other patches
# the pixels of one are independent, so that the log-density is the sum over patches in any order.
STAY = 0.9
STATES = torch.from_numpy(every_row(T, 2)).double()  # (2^T, T)
BY_PATCH = torch.stack([STATES[:, LABEL == p] for p in range(P)])  # (P, 2^T, 4)
ALIKE = BY_PATCH[1:] == BY_PATCH[:-1]
LOG_STEP = torch.tensor([1 - STAY, STAY], dtype=torch.float64).log()
TABLE = T / P * math.log(0.5) + LOG_STEP[ALIKE.long()].sum((0, 2))  # (2^T,)


def sample(n, seed):
    index = torch.multinomial(TABLE.exp(), n, True, generator=torch.Generator().manual_seed(seed))
    return STATES[index].numpy().astype(np.float32)


def every_mask():
    """All sets of hidden patches, each with its share of the area."""
    visible, weight = [], []
    for m in range(1, P + 1):
        for hidden in combinations(range(P), m):
            visible.append(~np.isin(LABEL, hidden))
            weight.append(~visible[-1] / (m * math.comb(P, m)))
    return Masks(torch.tensor(np.stack(visible)), None, torch.tensor(np.stack(weight)))


def rows_of(kind, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind.get("likelihood") == "gaussian":
        return 3 + 2 * torch.randn(n, T, generator=generator, dtype=torch.float64)
    levels = kind.get("n_levels") or 2
    return torch.randint(levels, (n, T), generator=generator).double()


def at_random(model, x, visible, seed=0):
    """The distribution of the pixels, at parameters away from their start; and these."""
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        first = rows_of(model.get_params(), 50, 9)
        model(first, torch.ones_like(first, dtype=torch.bool))
        for _, leaf in pyro.get_param_store().named_parameters():
            leaf += 0.3 * torch.randn_like(leaf)
        fn = base(pyro.poutine.trace(model).get_trace(x, visible).nodes["x"]["fn"])
        return fn, {name: value.clone() for name, value in pyro.get_param_store().items()}


def numbers(fn):
    return (
        torch.stack([fn.loc, fn.scale], -1) if hasattr(fn, "loc") else fn.logits.reshape(*fn.batch_shape, -1)
    )


# ------------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    ("shape", "patch", "size"), [((4, 6), (2, 3), (2, 3)), ((6, 3), 3, (3, 3)), ((4, 4, 3), 2, (2, 2))]
)
def test_patches(shape, patch, size):
    label = MaskedPatches(shape, patch).patches.reshape(*shape, -1)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected = row // size[0] * (shape[1] // size[1]) + column // size[1]
            assert (label[row, column] == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_changes_nothing(kind):
    model = clone(PROGRAM).set_params(n_layers=2, **kind)
    x = rows_of(kind)
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found = numbers(at_random(model, x, visible)[0])
    for other in (x.roll(1, 0), 1e6 + x, torch.full_like(x, torch.nan)):
        changed = torch.where(visible, x, other)
        assert torch.equal(numbers(at_random(model, changed, visible)[0]), found)
    # what is visible does change it, in other patches too, and rows keep to themselves
    moved = x.clone()
    moved[:, 0] = (x[:, 0] == 0).double()
    by_row = (numbers(at_random(model, moved, visible)[0]) - found)[:, LABEL > 0].abs().amax((1, 2))
    assert bool((by_row[visible[:, 0]] > 1e-4).all()) and bool((by_row[~visible[:, 0]] == 0).all())
    # and that a pixel is hidden is told apart from its being zero
    shown = torch.where(visible, x, 0.0)
    seen = numbers(at_random(model, shown, torch.ones_like(visible))[0])
    assert bool(((seen - found).abs().amax((1, 2)) > 1e-4).all())


def test_pixels_go_to_their_patches_and_back():
    """The network on what torch's unfold makes of the image, folded again."""
    shape, patch = (4, 6), (2, 3)
    model = MaskedPatches(shape, patch, 8, 1, 2)
    x = torch.randint(2, (5, 24), generator=torch.Generator().manual_seed(0)).double()
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
        model(x, torch.ones_like(visible))
        for _, leaf in pyro.get_param_store().named_parameters():
            leaf += torch.randn_like(leaf)
        found = base(pyro.poutine.trace(model).get_trace(x, visible).nodes["x"]["fn"]).logits
        params = {n.removeprefix("network."): v for n, v in pyro.get_param_store().items() if n != "start"}
        start = pyro.param("start")[:, 0]
        planes = torch.stack([x * visible, visible.double()], 1).reshape(5, 2, *shape)
        # (5, 2 x 6, 4) to (5, 4, 6 x 2): the pixels of a patch, each with its visibility
        patches = F.unfold(planes, patch, stride=patch).reshape(5, 2, 6, 4).permute(0, 3, 2, 1).flatten(2)
        net = _Transformer(_Net(4, 12, 6, 8, 1, 2)).double()
        out = functional_call(net, params, (patches,)).mT  # (5, 6, 4)
        expected = start + F.fold(out, shape, patch, stride=patch).flatten(1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [False, True])
def test_a_score_is_the_sum_of_the_densities_of_hidden_pixels(kind, missing):
    model = clone(PROGRAM).set_params(**kind)
    x = rows_of(kind)
    if missing:
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = torch.nan
    params = at_random(model, x.nan_to_num(1.0), ~x.isnan())[1]
    masks = Blocks(FixedRate(0.6), LABEL).draw(T, 3)
    assert 0 < int((~masks.visible).sum()) < T
    with pyro.get_param_store().scope(), torch.no_grad():
        found = SelfPredictive().bind(model, (x.nan_to_num(1.0),)).read((x,))
        for name, value in params.items():
            pyro.param(name).copy_(value)
        score = found.score(masks)
        seen = masks.visible & ~x.isnan()
        fn = base(pyro.poutine.trace(model).get_trace(torch.where(seen, x, 0.0), seen).nodes["x"]["fn"])
    value = x.numpy()
    if kind.get("likelihood") == "gaussian":
        by_pixel = stats.norm(fn.loc.numpy(), fn.scale.numpy()).logpdf(value)
    elif kind:
        p = np.exp(fn.logits.numpy()) / np.exp(fn.logits.numpy()).sum(-1, keepdims=True)
        codes = np.nan_to_num(value).astype(int)[..., None]
        by_pixel = np.where(np.isnan(value), np.nan, np.log(np.take_along_axis(p, codes, -1)[..., 0]))
    else:
        p = 1 / (1 + np.exp(-fn.logits.numpy()))
        by_pixel = value * np.log(p) + (1 - value) * np.log(1 - p)
    expected = np.nansum(np.where(masks.visible[0], 0.0, by_pixel), 1) * P / 2  # two of three patches
    np.testing.assert_allclose(score, expected, rtol=1e-10)


def test_rows_do_not_depend_on_each_other():
    x = rows_of({}, 7)
    x[2, 3] = torch.nan
    masks = Blocks(PermutationChain(2), LABEL).draw(T, 0)
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
        found = SelfPredictive().bind(PROGRAM, (x.nan_to_num(0.0),)).read((x,))
        whole = found.score(masks)
        alone = torch.cat([found.at(row[None]).score(masks) for row in x])
    np.testing.assert_allclose(alone, whole, atol=1e-12)


def test_every_order_of_patches_is_a_density():
    params = at_random(PROGRAM, STATES[:2], torch.ones(2, T, dtype=torch.bool))[1]
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
        found = SelfPredictive().bind(PROGRAM, (STATES,)).read((STATES,))
        for name, value in params.items():
            pyro.param(name).copy_(value)
        by_set = {
            seen: found.conditionals(torch.tensor(np.isin(LABEL, seen))[None])[0]
            for m in range(P)
            for seen in combinations(range(P), m)
        }
        area = found.score(every_mask())
        some = STATES[::32]
        e = estimate(found.at(some), Blocks(PermutationChain(4), LABEL), n_replicates=8, random_state=0)
    by_order = torch.stack(
        [
            sum(by_set[tuple(sorted(order[:t]))][:, LABEL == order[t]].sum(1) for t in range(P))
            for order in permutations(range(P))
        ]
    )  # (P!, 2^T)
    np.testing.assert_allclose(by_order.logsumexp(1), 0.0, atol=1e-10)
    assert float(by_order.std(0).mean()) > 0.1
    np.testing.assert_allclose(by_order.mean(0), area, atol=1e-10)
    assert abs(e.total - float(area[::32].sum())) < 3 * e.se
    assert e.by_size.area * len(some) == pytest.approx(e.total, rel=1e-10)


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def fitted():
    """Before and after the training."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        settings = {
            "masks": Blocks(UniformSize(64), LABEL),
            "predictor": SelfPredictive(1),
            "random_state": 0,
        }
        X = sample(3000, 0)
        with pytest.warns(ConvergenceWarning):
            before = BayesMPT(
                PROGRAM, training=Epochs(128, max_epochs=1, learning_rate=1e-9), **settings
            ).fit(X)
        after = BayesMPT(
            PROGRAM,
            training=Epochs(128, max_epochs=16, learning_rate=8e-3, validation_fraction=0.0),
            **settings,
        )
        return before, after.fit(X)


def area_of(model):
    """Of all images (2^T,), over all masks of patches."""
    with model.read_rows(STATES.numpy()) as predictor, torch.no_grad():
        return predictor.score(every_mask()).double()


@pytest.mark.slow
def test_training_starts_at_independent_pixels(fitted):
    share = (sample(4000, 0).astype(float).sum(0) + 0.5) / 4001
    independent = STATES @ torch.tensor(np.log(share)) + (1 - STATES) @ torch.tensor(np.log1p(-share))
    assert float((area_of(fitted[0]) - independent).abs().max()) < 0.5
    assert abs(float(TABLE.exp() @ (area_of(fitted[0]) - independent))) < 0.05


@pytest.mark.slow
def test_area_lies_below_the_exact_log_likelihood_and_approaches_it(fitted):
    """In expectation over all images, so that nothing is left to chance but the training."""
    before, after = (float(TABLE.exp() @ (TABLE - area_of(model))) for model in fitted)
    assert 0 < after < 0.1 and before > 2.5
    fresh = sample(500, 1)  # and on images as they come
    e = fitted[1].estimate(fresh, masks=Blocks(PermutationChain(), LABEL))
    truth = np.array([TABLE[(STATES == torch.tensor(row)).all(1)].item() for row in fresh])
    assert abs(e.lml - truth).mean() < 0.5
    assert e.total < truth.sum() + 3 * e.se + 3 * (e.lml - truth).std() * math.sqrt(500)


@pytest.mark.slow
def test_single_pixels_can_be_hidden_too(fitted):
    """Of a network trained on patches any mask may be asked, such as one by the pixels that are missing."""
    X = sample(300, 2)
    hidden = np.zeros_like(X, dtype=bool)
    hidden[:, LABEL == 1] = True
    filled = fitted[1].impute(np.where(hidden, np.nan, X))
    assert (filled[~hidden] == X[~hidden]).all()
    first, last = X[:, LABEL == 0], X[:, LABEL == 2]
    # p(middle = 1 | both sides), the pixels of a patch alike
    ratio = np.log(STAY / (1 - STAY)) * (2 * first - 1 + 2 * last - 1)
    assert abs(filled[:, LABEL == 1] - 1 / (1 + np.exp(-ratio))).mean() < 0.1  # by halves 0.40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_missing_pixels_in_training():
    X = sample(2000, 3)
    X[np.random.default_rng(0).random(X.shape) < 0.2] = np.nan
    model = BayesMPT(
        PROGRAM,
        masks=Blocks(UniformSize(64), LABEL),
        predictor=SelfPredictive(1),
        training=Epochs(max_epochs=15, batch_size=128, learning_rate=5e-3, validation_fraction=0.0),
        random_state=0,
    ).fit(X)
    assert 0 < float(TABLE.exp() @ (TABLE - area_of(model))) < 0.6  # of 3.0 by independent pixels
    nothing = model.estimate(np.full((1, T), np.nan), masks=Blocks(EverySize(), LABEL), n_replicates=2)
    assert nothing.total == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training stopped")
def test_normal_pixels():
    """Two patches whose pixels are pairs of a bivariate Normal; scales must shrink where the other patch is seen."""
    rng = np.random.default_rng(0)
    cov = np.array([[1.0, 0.9], [0.9, 1.0]])
    pairs = rng.multivariate_normal([0, 0], cov, size=(4000, 4))  # (N, pixel, patch)
    model = MaskedPatches((2, 4), 2, 32, 1, 2, likelihood="gaussian")
    X = np.empty((4000, 8), dtype=np.float32)
    for patch in range(2):
        X[:, model.patches == patch] = 5 + 3 * pairs[:, :, patch]
    truth = stats.multivariate_normal([0, 0], cov).logpdf(pairs).sum(1) - 8 * math.log(3)
    settings = {
        "training": Epochs(max_epochs=16, batch_size=128, learning_rate=8e-3, validation_fraction=0.0)
    }
    masks = Blocks(UniformSize(64), model.patches)
    fit = BayesMPT(model, masks=masks, predictor=SelfPredictive(1), random_state=0, **settings).fit(X[:3000])
    e = fit.estimate(X[3000:], masks=Blocks(PermutationChain(), model.patches))
    gap = truth[3000:] - e.lml
    assert 0 < gap.mean() < 0.3
    assert e.se / 1000 < 0.05


def test_a_constant_pixel_has_a_bounded_density(own_store):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] = 2.0
    with torch.random.fork_rng(), torch.no_grad():
        model = MaskedPatches((2, 4), 2, 8, 1, 1, likelihood="gaussian")
        model(x, torch.ones_like(x, dtype=torch.bool))
        pyro.param("network.read.bias").fill_(-1e6)
        fn = base(pyro.poutine.trace(model).get_trace(x, x > 0).nodes["x"]["fn"])
    assert float(fn.scale[0, 3]) == MIN_SCALE
    np.testing.assert_allclose(fn.scale[0], MIN_SCALE * np.where(np.arange(8) == 3, 1.0, x.std(0)))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_shape": (2, 5)}, r"tiled by patches .*got \(2, 5\) and 2"),
        ({"image_shape": (3, 4)}, r"tiled by patches .*got \(3, 4\) and 2"),
        ({"image_shape": (2, 4)}, r"holds 8 values, but rows 12"),
        ({"image_shape": 12}, "tiled by patches"),
        ({"image_shape": (2, 6.0)}, "image_shape must hold integers"),
        ({"patch": 0}, "patch must hold integers"),
        ({"patch": (2, 2, 3)}, "tiled by patches"),
        ({"width": 0}, "width must be an integer"),
        ({"n_layers": 1.5}, "n_layers must be an integer"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"likelihood": "squared error"}, "likelihood must be one of bernoulli, categorical, gaussian"),
        ({"likelihood": "categorical", "n_levels": 1}, "codes 0, ..., 0, got 1"),
    ],
)
def test_refused_settings(change, words):
    with pytest.raises(ValueError, match=words):
        BayesMPT(clone(PROGRAM).set_params(**change), random_state=0).fit(sample(60, 0))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [2.0, -1.0, 0.5])
def test_values_outside_the_support(fitted, cell):
    X = sample(60, 0)
    X[7, 2] = cell
    words = f"column 2 must hold codes 0, ..., 1, got {cell:g}"
    with pytest.raises(ValueError, match=words):
        BayesMPT(PROGRAM, random_state=0).fit(X)
    with pytest.raises(ValueError, match=words):
        fitted[1].estimate(X, masks=Blocks(EverySize(), LABEL))
    # where it is never shown, its own distribution refuses it
    with fitted[1].read_rows(sample(60, 0)) as predictor, pytest.raises(ValueError, match="support"):
        bad = predictor.value.clone()
        bad[7, 2] = cell
        predictor.at(bad).score(FixedRate(1.0).draw(T))
