"""Mask policies against a Gaussian of five tokens whose conditionals are worked out here, one by one, with numpy."""

import math
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from truths import conditionals, log_density

from bayes_mpt.masks import (
    Blocks,
    EverySize,
    FixedRate,
    LeaveOneOut,
    Masks,
    PermutationChain,
    UniformSize,
    require_lml,
)

SEED = 1991
T = 5
GROUPS = [0, 1, 0, 2, 1, 1, 2, 0]

POLICIES = [
    PermutationChain(),
    PermutationChain(n_chains=7),
    PermutationChain(n_chains=4, groups=GROUPS),
    UniformSize(),
    UniformSize(n_masks=8),
    UniformSize(n_masks=11),
    EverySize(),
    EverySize(n_masks=3),
    FixedRate(),
    FixedRate(rate=0.5, n_masks=4),
    LeaveOneOut(),
]
RANDOM = [policy for policy in POLICIES if not isinstance(policy, LeaveOneOut)]
UNGROUPED = [policy for policy in POLICIES if getattr(policy, "groups", None) is None]
MASKED = [policy for policy in POLICIES if not isinstance(policy, PermutationChain)]
POWER_OF_TWO = 1 << np.arange(T)


def n_tokens_of(policy):
    return len(GROUPS) if getattr(policy, "groups", None) is not None else 8


# -- the truth: every conditional of one Gaussian, each from its own dense inverse


@pytest.fixture(scope="module")
def conditional():
    """`conditional[subset, i]` = log p(x_i | x_subset), NaN where i is in the subset, and the log density of x."""
    rng = np.random.default_rng(SEED)
    loading = np.array([[2.0, 0.3], [1.7, -0.4], [-1.5, 0.2], [1.2, 0.8], [0.9, -0.6]])
    cov = loading @ loading.T + np.diag([0.1, 0.2, 0.3, 0.4, 0.5])
    x = loading @ [0.8, -0.5] + 0.3 * rng.normal(size=T)

    seen = (np.arange(2**T)[:, None] >> np.arange(T) & 1).astype(bool)  # (2^T, T)
    table = np.array([np.where(s, np.nan, conditionals(x, s, np.zeros(T), cov)) for s in seen])
    return table, log_density(x[None], np.zeros(T), cov)[0]


def mean_by_size(table):
    """S(x; m) for m = 1..T: the mean, over all masks of m hidden tokens, of the mean hidden token; and its variance."""
    mean, variance = np.empty(T), np.empty(T)
    for m in range(1, T + 1):
        values = [
            np.mean([table[sum(1 << j for j in range(T) if j not in hidden), i] for i in hidden])
            for hidden in combinations(range(T), m)
        ]
        mean[m - 1], variance[m - 1] = np.mean(values), np.var(values)
    return mean, variance


def score(masks, table):
    """sum_k sum_i weight[k, i] log p(x_i | x_visible[k]), by looking every term up."""
    weight = masks.weight.numpy()
    if masks.visible is not None:
        return np.nansum(weight * table[masks.visible.numpy() @ POWER_OF_TWO])
    total = 0.0
    for order, w in zip(masks.order.numpy(), weight, strict=True):
        assert np.all(w == w[0])
        subset = 0
        for i in order:
            total += w[i] * table[subset, i]
            subset |= 1 << int(i)
    return total


DRAWN, SEEDED = (
    {},
    {},
)  # what tests before have drawn: (generator, scores), and scores by their seeds 0, 1, ...


def draws(policy, table, n_draws):
    """Scores of the first ``n_draws`` draws, one after the other from one generator."""
    generator, found = DRAWN.setdefault(repr(policy), (torch.Generator().manual_seed(SEED), []))
    found += [score(policy.draw(T, generator), table) for _ in range(n_draws - len(found))]
    return np.array(found[:n_draws])


def seeded(policy, table, n_draws):
    """Scores of a draw from each of the seeds 0, 1, ..."""
    found = SEEDED.setdefault(repr(policy), [])
    found += [score(policy.draw(T, s), table) for s in range(len(found), n_draws)]
    return np.array(found[:n_draws])


def z_score(values, truth):
    return abs(values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values)))


def test_the_table_itself_satisfies_proposition_1(conditional):
    table, joint = conditional
    mean, _ = mean_by_size(table)
    assert mean.sum() == pytest.approx(joint, abs=1e-12)
    # and the policies that are no LML have something to fail at
    assert T * mean[0] - joint > 0.5
    assert T * mean[1] - joint > 0.5


# -- what a draw looks like


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_shapes_and_types(policy):
    n_tokens = n_tokens_of(policy)
    masks = policy.draw(n_tokens, SEED)
    assert isinstance(masks, Masks)
    assert (masks.visible is None) != (masks.order is None)
    if isinstance(policy, PermutationChain):
        n_rows, field, dtype = policy.n_chains, masks.order, torch.int64
    else:
        per_draw = {UniformSize: 1, EverySize: n_tokens, FixedRate: 1, LeaveOneOut: n_tokens}[type(policy)]
        n_rows, field, dtype = per_draw * getattr(policy, "n_masks", 1), masks.visible, torch.bool
    assert field.shape == (n_rows, n_tokens) and field.dtype == dtype
    assert masks.weight.shape == (n_rows, n_tokens) and masks.weight.is_floating_point()
    assert torch.isfinite(masks.weight).all() and (masks.weight >= 0).all()


@pytest.mark.parametrize("policy", [p for p in POLICIES if isinstance(p, PermutationChain)], ids=repr)
def test_chains_are_permutations_of_equal_weight(policy):
    n_tokens = n_tokens_of(policy)
    masks = policy.draw(n_tokens, SEED)
    assert torch.equal(masks.order.sort(1).values, torch.arange(n_tokens).expand(policy.n_chains, n_tokens))
    np.testing.assert_allclose(masks.weight.double(), 1 / policy.n_chains, rtol=1e-6)


@pytest.mark.parametrize("policy", MASKED, ids=repr)
def test_exactly_the_hidden_tokens_carry_weight(policy):
    masks = policy.draw(8, SEED)
    assert torch.equal(masks.weight > 0, ~masks.visible)


@pytest.mark.parametrize("n_masks", [1, 3, 20])
def test_weights_of_uniform_size(n_masks):
    masks = UniformSize(n_masks).draw(8, SEED)
    hidden = ~masks.visible.numpy()
    size = hidden.sum(1, keepdims=True)
    assert size.min() >= 1
    np.testing.assert_allclose(masks.weight, hidden * 8 / size / n_masks, rtol=1e-6)


@pytest.mark.parametrize("n_masks", [1, 3])
def test_every_size_holds_every_size_equally_often(n_masks):
    masks = EverySize(n_masks).draw(8, SEED)
    hidden = ~masks.visible.numpy()
    size = hidden.sum(1, keepdims=True)
    assert sorted(size.ravel()) == sorted(list(range(1, 9)) * n_masks)
    np.testing.assert_allclose(masks.weight, hidden / size / n_masks, rtol=1e-6)


@pytest.mark.parametrize(("rate", "m"), [(0.15, 3), (0.5, 10), (0.9, 18), (0.01, 1)])
def test_fixed_rate_hides_its_share(rate, m):
    masks = FixedRate(rate, n_masks=6).draw(20, SEED)
    hidden = ~masks.visible.numpy()
    assert (hidden.sum(1) == m).all()
    np.testing.assert_allclose(masks.weight, hidden * 20 / m / 6, rtol=1e-6)


def test_leave_one_out_hides_each_token_once():
    masks = LeaveOneOut().draw(8, SEED)
    assert torch.equal((~masks.visible).sum(0), torch.ones(8, dtype=torch.int64))
    np.testing.assert_allclose(masks.weight, (~masks.visible).double(), rtol=1e-6)


@pytest.mark.parametrize("n_masks", [2, 5, 12, 40, 43])
def test_uniform_size_is_stratified(n_masks):
    """Unstratified draws leave these bounds: 40 masks over 8 sizes would have a standard deviation of 2 a size."""
    for seed in range(40):
        size = (~UniformSize(n_masks).draw(8, seed).visible).sum(1)
        count = np.bincount(size, minlength=9)[1:]
        assert np.abs(count - n_masks / 8).max() < 2


@pytest.mark.parametrize("policy", UNGROUPED, ids=repr)
def test_one_token(policy):
    """With one token every policy hides it and the score is log p(x_1)."""
    masks = policy.draw(1, SEED)
    assert masks.weight.sum().item() == pytest.approx(1)
    assert masks.visible is None or not masks.visible.any()


@pytest.mark.parametrize("policy", [p for p in UNGROUPED if p in RANDOM], ids=repr)
def test_every_token_is_treated_alike(policy):
    """Over many draws each token is hidden (or comes first) equally often, whatever its place."""
    generator = torch.Generator().manual_seed(SEED)
    n_draws, first = 2000, np.zeros(8)
    for _ in range(n_draws):
        masks = policy.draw(8, generator)
        if masks.order is not None:
            first += np.bincount(masks.order[:, 0], minlength=8)
        else:
            first += (~masks.visible).double().mean(0).numpy()
    expected = first.mean()
    # Bernoulli counts vary by at most sqrt(expected); seven degrees of freedom, five deviations
    assert np.abs(first - expected).max() < 5 * math.sqrt(expected)


# -- groups


def test_tokens_of_a_group_stay_together():
    labels = np.array(GROUPS)
    order = PermutationChain(n_chains=300, groups=GROUPS).draw(8, SEED).order.numpy()
    for row in order:
        runs = [labels[row[0]]] + [labels[b] for a, b in pairwise(row) if labels[a] != labels[b]]
        assert sorted(runs) == [0, 1, 2]
    assert len({tuple(dict.fromkeys(labels[row])) for row in order}) == 6, "all orders of the groups"
    inside = {tuple(i for i in row if labels[i] == 1) for row in order}
    assert len(inside) == 6, "all orders inside a group"


@pytest.mark.parametrize("groups", [[0, 1, 0, 2, 1], np.array([3, 3, 3, 7, 7]), ("u", "v", "u", "v", "u")])
def test_labels_may_be_a_list_an_array_or_strings(groups, conditional):
    table, joint = conditional
    policy = PermutationChain(n_chains=6, groups=groups)
    assert score(policy.draw(T, SEED), table) == pytest.approx(joint, abs=1e-12)
    np.testing.assert_array_equal(clone(policy).groups, groups)


# -- seeds


def same(a, b):
    return all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_seed_gives_the_same_masks(policy):
    n_tokens = n_tokens_of(policy)
    assert same(policy.draw(n_tokens, 7), policy.draw(n_tokens, 7))
    assert same(policy.draw(n_tokens, 7), clone(policy).draw(n_tokens, np.int64(7)))
    assert same(
        policy.draw(n_tokens, torch.Generator().manual_seed(7)),
        policy.draw(n_tokens, torch.Generator().manual_seed(7)),
    )


@pytest.mark.parametrize("policy", RANDOM, ids=repr)
def test_other_seeds_and_a_used_generator_give_other_masks(policy):
    n_tokens = n_tokens_of(policy)
    policy, generator = clone(policy), torch.Generator().manual_seed(7)
    if "n_masks" in policy.get_params():
        policy.set_params(n_masks=6)
    else:
        policy.set_params(n_chains=6)
    assert not same(policy.draw(n_tokens, 7), policy.draw(n_tokens, 8))
    assert not same(policy.draw(n_tokens, generator), policy.draw(n_tokens, generator))
    assert not same(policy.draw(n_tokens), policy.draw(n_tokens)), "None is a fresh seed"


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_draw_leaves_the_global_generator_alone(policy):
    before = torch.random.get_rng_state()
    policy.draw(n_tokens_of(policy), 7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_deterministic_says_whether_the_seed_matters():
    assert LeaveOneOut.deterministic and same(LeaveOneOut().draw(8), LeaveOneOut().draw(8, 3))
    assert not any(p.deterministic for p in (PermutationChain, UniformSize, EverySize, FixedRate))


# -- a policy is a scikit-learn object


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_clone_parameters_and_repr(policy):
    twin = clone(policy)
    assert twin is not policy and twin.get_params() == policy.get_params()
    text = repr(policy)
    assert text.startswith(type(policy).__name__)
    assert eval(text).get_params() == policy.get_params()
    names = {
        "PermutationChain": {"n_chains", "groups"},
        "FixedRate": {"rate", "n_masks"},
        "LeaveOneOut": set(),
    }
    assert set(policy.get_params()) == names.get(type(policy).__name__, {"n_masks"})


def test_set_params_is_seen_by_the_next_draw():
    assert UniformSize().set_params(n_masks=4).draw(6, SEED).visible.shape == (4, 6)
    assert PermutationChain().set_params(n_chains=3).draw(6, SEED).order.shape == (3, 6)


def test_defaults():
    assert PermutationChain().get_params() == {"n_chains": 1, "groups": None}
    assert UniformSize().get_params() == EverySize().get_params() == {"n_masks": 1}
    assert FixedRate().get_params() == {"rate": 0.15, "n_masks": 1}


def test_is_lml():
    assert [p.is_lml for p in (PermutationChain, UniformSize, EverySize, FixedRate, LeaveOneOut)] == [
        True
    ] * 3 + [False] * 2
    assert PermutationChain().is_lml and not FixedRate().is_lml


# -- expectations

CHAINS = [PermutationChain(), PermutationChain(3), PermutationChain(2, groups=[0, 1, 0, 1, 2])]


@pytest.mark.parametrize("policy", CHAINS, ids=repr)
def test_every_chain_is_the_lml(policy, conditional):
    table, joint = conditional
    np.testing.assert_allclose(draws(policy, table, 200), joint, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [UniformSize(), UniformSize(3), EverySize()], ids=repr)
def test_unbiased(policy, conditional):
    table, joint = conditional
    values = draws(policy, table, 10_000)
    assert values.std() > 0.1, "noisy, so that the z-score means something"
    assert z_score(values, joint) < 3


@pytest.mark.slow
def test_unbiased_over_integer_seeds(conditional):
    table, joint = conditional
    assert z_score(seeded(UniformSize(), table, 10_000), joint) < 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "m"), [(FixedRate(0.2), 1), (FixedRate(0.4), 2), (FixedRate(0.4, n_masks=3), 2)]
)
def test_fixed_rate_is_the_score_of_its_size_and_not_the_lml(policy, m, conditional):
    table, joint = conditional
    mean, _ = mean_by_size(table)
    values = draws(policy, table, 10_000)
    assert z_score(values, T * mean[m - 1]) < 3
    assert z_score(values, joint) > 20


def test_leave_one_out_is_the_pseudo_likelihood_and_not_the_lml(conditional):
    table, joint = conditional
    pseudo = sum(table[(1 << T) - 1 - (1 << i), i] for i in range(T))
    value = score(LeaveOneOut().draw(T), table)
    assert value == pytest.approx(pseudo, abs=1e-12)
    assert abs(value - joint) > 0.5


# -- spread: the exact variances come from enumeration


@pytest.mark.slow
def test_spread_of_single_masks_is_the_enumerated_one(conditional):
    table, joint = conditional
    mean, variance = mean_by_size(table)
    uniform = math.sqrt(np.mean((T * mean) ** 2 + T**2 * variance) - joint**2)
    every = math.sqrt(variance.sum())
    assert draws(UniformSize(), table, 10_000).std() == pytest.approx(uniform, rel=0.05)
    assert draws(EverySize(), table, 10_000).std() == pytest.approx(every, rel=0.05)
    assert every < uniform


@pytest.mark.slow
def test_stratified_masks_are_less_noisy_than_independent_ones(conditional):
    table, _ = conditional
    _, variance = mean_by_size(table)
    # 20 masks are four of each size: only the variance inside a size is left
    left = math.sqrt(sum(4 * T**2 * variance) / 20**2)
    stratified = draws(UniformSize(20), table, 800)
    independent = draws(UniformSize(), table, 800 * 20).reshape(800, 20).mean(1)
    assert stratified.std() < 0.9 * independent.std()
    assert stratified.std() < 1.08 * left


@pytest.mark.slow
@pytest.mark.parametrize("policy", [UniformSize(), EverySize(), FixedRate(0.4)], ids=repr)
def test_spread_falls_as_one_over_the_root_of_the_replicates(policy, conditional):
    table, _ = conditional
    values = seeded(policy, table, 8_000)
    for n_replicates in (4, 16):
        ratio = values.std() / values.reshape(-1, n_replicates).mean(1).std()
        assert ratio == pytest.approx(math.sqrt(n_replicates), rel=0.12)


@pytest.mark.parametrize("kind", [EverySize, FixedRate])
def test_more_masks_in_a_draw_spread_no_more_than_independent_draws(kind, conditional):
    table, _ = conditional
    one, sixteen = draws(kind(n_masks=1), table, 4000).std(), draws(kind(n_masks=16), table, 2000).std()
    assert sixteen < 1.08 * one / 4


# -- bad arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        (UniformSize, {"n_masks": 0}, "n_masks"),
        (UniformSize, {"n_masks": -3}, "n_masks"),
        (UniformSize, {"n_masks": 1.5}, "n_masks"),
        (UniformSize, {"n_masks": "8"}, "n_masks"),
        (EverySize, {"n_masks": 0}, "n_masks"),
        (EverySize, {"n_masks": None}, "n_masks"),
        (FixedRate, {"n_masks": 0}, "n_masks"),
        (FixedRate, {"rate": 0}, "rate"),
        (FixedRate, {"rate": 0.0}, "rate"),
        (FixedRate, {"rate": 1.5}, "rate"),
        (FixedRate, {"rate": -0.2}, "rate"),
        (FixedRate, {"rate": float("nan")}, "rate"),
        (FixedRate, {"rate": "15%"}, "rate"),
        (PermutationChain, {"n_chains": 0}, "n_chains"),
        (PermutationChain, {"n_chains": 2.5}, "n_chains"),
        (PermutationChain, {"groups": [0, 1]}, r"groups.*(2.*5|5.*2)|(2.*5|5.*2).*groups"),
        (PermutationChain, {"groups": [0] * 6}, r"groups.*(6.*5|5.*6)|(6.*5|5.*6).*groups"),
    ],
    ids=repr,
)
def test_bad_arguments_are_named(kind, arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"(?s){name}"):
        kind(**arguments).draw(T, SEED)


@pytest.mark.parametrize(
    "policy", [PermutationChain(), UniformSize(), EverySize(), FixedRate(), LeaveOneOut()], ids=repr
)
@pytest.mark.parametrize("n_tokens", [0, -1])
def test_no_tokens(policy, n_tokens):
    with pytest.raises(ValueError, match=rf"token|{n_tokens}"):
        policy.draw(n_tokens, SEED)


@pytest.mark.parametrize("seed", ["seven", 1.5, object()], ids=["str", "float", "object"])
def test_bad_seed(seed):
    with pytest.raises((ValueError, TypeError), match="(?i)seed|random_state|generator"):
        UniformSize().draw(T, seed)


# -- blocks


@pytest.mark.parametrize("policy", [UniformSize(3), EverySize(2), FixedRate(0.5, 4), LeaveOneOut()], ids=repr)
def test_blocks_are_the_masks_of_fewer_tokens(policy):
    """Whatever the labels: a block has the visibility and the weight of its token."""
    named = np.array(["b", "a", "c"])[GROUPS]
    few, many = policy.draw(3, SEED), Blocks(policy, named).draw(8, SEED)
    assert many.order is None and many.visible.shape == many.weight.shape == (len(few.visible), 8)
    for token, label in enumerate(named):
        block = "abc".index(label)
        assert torch.equal(many.visible[:, token], few.visible[:, block])
        assert torch.equal(many.weight[:, token], few.weight[:, block])


BLOCKS = [0, 1, 1, 0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [UniformSize(2), PermutationChain(2)], ids=repr)
def test_the_expectation_of_blocks_is_a_mean_over_their_orders(policy, conditional):
    table, joint = conditional
    by_order = []
    for order in permutations(range(3)):
        subset, total = 0, 0.0
        for block in order:
            tokens = [i for i in range(T) if BLOCKS[i] == block]
            total += sum(table[subset, i] for i in tokens)
            subset |= sum(1 << i for i in tokens)
        by_order.append(total)
    assert abs(np.mean(by_order) - joint) > 0.5, "and that is not the LML of a model with latents"
    values = draws(Blocks(policy, BLOCKS), table, 10_000)
    assert values.std() > 0.1 and z_score(values, np.mean(by_order)) < 3


def test_blocks_of_one_token_are_no_blocks(conditional):
    table, _ = conditional
    for policy in (UniformSize(3), EverySize()):
        assert score(Blocks(policy, range(T)).draw(T, 3), table) == score(policy.draw(T, 3), table)


def test_chains_of_blocks_are_the_sum_along_one_order(conditional):
    """Every token counts once in each order, given the blocks before its own."""
    table, _ = conditional
    chains = PermutationChain(3).draw(3, SEED)
    total = 0.0
    for order in chains.order.numpy():
        for step, block in enumerate(order):
            subset = sum(1 << i for i in range(T) if BLOCKS[i] in order[:step])
            total += sum(table[subset, i] for i in range(T) if BLOCKS[i] == block) / 3
    masks = Blocks(PermutationChain(3), BLOCKS).draw(T, SEED)
    assert masks.order is None and masks.visible.shape == (9, T)
    assert not bool(masks.weight[masks.visible].any())
    np.testing.assert_allclose(masks.weight.sum(0), 1.0, rtol=1e-12)
    assert score(masks, table) == pytest.approx(total, abs=1e-12)


def test_refused_blocks():
    with pytest.raises(TypeError, match="must be a mask policy"):
        Blocks("chain", GROUPS).draw(8, SEED)
    with pytest.raises(ValueError, match=r"wanted shape \(8,\), got \(2,\)"):
        Blocks(EverySize(), [0, 1]).draw(8)
    with pytest.raises(ValueError, match="n_masks must be an integer"):
        Blocks(EverySize(0), GROUPS).draw(8)


def test_where_blocks_may_be_reported():
    require_lml(Blocks(EverySize(), GROUPS), "it", independent=True)
    assert not Blocks(EverySize(), GROUPS).is_lml
    with pytest.raises(ValueError, match=r"it needs masks .*LML.* Blocks .* EverySize\(\) itself"):
        require_lml(Blocks(EverySize(), GROUPS), "it")
    for policy in (FixedRate(), LeaveOneOut()):  # sizes are missing all the same
        with pytest.raises(ValueError, match="leaves out mask sizes"):
            require_lml(Blocks(policy, GROUPS), "it", independent=True)
