"""Masked language models against plain loops over masks, one text at a time and without padding, in float64."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from truths import every_mask, lml_weights

transformers = pytest.importorskip("transformers", reason="the extra `language` is not installed")

from bayes_mpt.language import MaskedLanguageModel, compare_language_models  # noqa: E402
from bayes_mpt.masks import (  # noqa: E402
    EverySize,
    FixedRate,
    LeaveOneOut,
    Masks,
    PermutationChain,
    Policy,
    UniformSize,
)
from bayes_mpt.plots import MaskedCurveDisplay, RankingDisplay  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "on", "mat", "dog"]
MASK, PAD = WORDS.index("[MASK]"), WORDS.index("[PAD]")
TEXTS = ["the cats sat", "dog", "the dog sat on the mat", "cats on cats"]
LENGTHS = [4, 1, 6, 5]  # ##s is a token


def tokenizer(words=WORDS, **more):
    return transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, **more)


def network(kind="Bert", seed=0, **more):
    """Tiny, and opinionated: freshly initialised ones predict nearly the same whatever they see."""
    config = {
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "pad_token_id": PAD,
        "initializer_range": 0.8,
    } | more
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**config))
    return model.double().eval()


def by_hand(model, ids, hidden):
    """log p(x_i | x_visible) of the hidden places of one text: no padding, no attention mask, one mask."""
    shown = list(ids)
    for place in hidden:
        shown[place] = MASK
    with torch.no_grad():
        log_prob = model(input_ids=torch.tensor([shown])).logits[0].log_softmax(-1)
    return {place: float(log_prob[place, ids[place]]) for place in hidden}


def along(model, ids, order):
    """log p_o(x)."""
    return sum(by_hand(model, ids, order[t:])[order[t]] for t in range(len(order)))


def all_orders(model, ids):
    return np.array([along(model, ids, list(o)) for o in itertools.permutations(range(1, len(ids) - 1))])


class EveryMask(Policy):
    """All of them, S(m) exactly."""

    is_lml, deterministic = True, True

    def draw(self, n_tokens, random_state=None):
        visible = every_mask(n_tokens)
        return Masks(torch.from_numpy(visible), None, torch.from_numpy(lml_weights(visible)))


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_area_is_the_mean_over_all_orders(kind):
    model, cut = network(kind), tokenizer()
    found = MaskedLanguageModel(model, cut).estimate(
        [*TEXTS[:2], "cats on"], masks=EveryMask(), n_replicates=1
    )
    texts = [cut(t)["input_ids"] for t in [*TEXTS[:2], "cats on"]]
    by_order = [all_orders(model, ids) for ids in texts]
    assert [len(o) for o in by_order] == [24, 1, 6]
    assert by_order[0].std() > 0.05  # they do disagree
    np.testing.assert_allclose(found.score, [o.mean() for o in by_order], rtol=0, atol=1e-10)
    assert math.isnan(found.se) and list(found.n_tokens) == [4, 1, 3]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("batch_tokens", [1, 23, 4096])
def test_pseudo_log_likelihood(kind, batch_tokens):
    model, cut = network(kind), tokenizer()
    found = MaskedLanguageModel(model, cut, batch_tokens=batch_tokens).pseudo_log_likelihood(TEXTS)
    hand = []
    for text in TEXTS:
        ids = cut(text)["input_ids"]
        hand.append(sum(by_hand(model, ids, [i])[i] for i in range(1, len(ids) - 1)))
    np.testing.assert_allclose(found, hand, rtol=0, atol=1e-10)


def test_random_masks_against_a_loop():
    model, cut = network(), tokenizer()
    lm, policy = MaskedLanguageModel(model, cut), UniformSize(5)
    found = lm.estimate([TEXTS[2]], masks=policy, n_replicates=3, random_state=7)
    ids, generator, totals = cut(TEXTS[2])["input_ids"], torch.Generator().manual_seed(7), []
    for _ in range(3):
        visible, _, weight = policy.draw(LENGTHS[2], generator)
        total = 0.0
        for shown, w in zip(visible, weight, strict=True):
            hidden = [i + 1 for i in range(LENGTHS[2]) if not shown[i]]
            total += sum(float(w[i - 1]) * v for i, v in by_hand(model, ids, hidden).items())
        totals.append(total)
    np.testing.assert_allclose(found.diagnostics["totals"], totals, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.score, [np.mean(totals)], rtol=0, atol=1e-10)
    assert found.se == found.score_se[0] > np.std(totals) / 3**0.5
    np.testing.assert_array_equal(
        lm.score_samples([TEXTS[2]], masks=policy, n_replicates=3, random_state=7), found.score
    )


@pytest.mark.parametrize("policy", [UniformSize(4), EverySize(), PermutationChain()])
def test_policies_are_unbiased(policy):
    model, cut = network(), tokenizer()
    lm = MaskedLanguageModel(model, cut)
    truth = lm.estimate(TEXTS, masks=EveryMask(), n_replicates=1).score
    found = lm.estimate(TEXTS, masks=policy, n_replicates=200)
    some = found.score_se > 1e-12  # one token has one mask
    assert list(some) == [True, False, True, True]
    assert (np.abs(found.score - truth)[some] < 4 * found.score_se[some]).all()
    assert abs(found.total - truth.sum()) < 4 * found.se
    np.testing.assert_allclose(found.score[1], truth[1], rtol=0, atol=1e-10)


def test_orders_and_their_mixture():
    model, cut = network(), tokenizer()
    policy = PermutationChain(n_chains=3)
    found = MaskedLanguageModel(model, cut).estimate([TEXTS[0]], masks=policy, n_replicates=2, random_state=3)
    generator = torch.Generator().manual_seed(3)
    orders = [1 + o for _ in range(2) for o in policy.draw(LENGTHS[0], generator).order]
    hand = np.array([along(model, cut(TEXTS[0])["input_ids"], o.tolist()) for o in orders])
    np.testing.assert_allclose(found.diagnostics["totals"], hand, rtol=0, atol=1e-10)
    assert found.diagnostics["log_mean_exp"] == pytest.approx(
        np.logaddexp.reduce(hand) - math.log(6), abs=1e-10
    )
    assert found.diagnostics["order_sd"] == pytest.approx(hand.std(ddof=1), abs=1e-10)
    assert found.total < found.diagnostics["log_mean_exp"]


def test_each_order_is_normalised():
    model, cut = network(), tokenizer()
    with torch.no_grad():
        model.cls.predictions.bias[: MASK + 1] = -1e4  # nothing on special tokens
    texts = [[2, a, b, 3] for a in range(MASK + 1, len(WORDS)) for b in range(MASK + 1, len(WORDS))]
    lm = MaskedLanguageModel(model, cut)
    policy = PermutationChain()
    score = np.array(
        [lm.score_samples([t], masks=policy, n_replicates=1, random_state=s) for t in texts for s in (0, 4)]
    )
    by_order = score.reshape(-1, 2).T
    firsts = {int(policy.draw(2, s).order[0, 0]) for s in (0, 4)}
    assert firsts == {0, 1}
    np.testing.assert_allclose(np.exp(by_order).sum(1), 1, rtol=0, atol=1e-10)
    assert np.exp(lm.pseudo_log_likelihood(texts)).sum() != pytest.approx(1, abs=1e-3)  # which is no density


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_batches_change_nothing_and_are_bounded(kind):
    model, cut = network(kind), tokenizer()
    sizes = []

    def look(module, args, kwargs):
        ids, attention = kwargs["input_ids"], kwargs["attention_mask"]
        assert torch.equal(attention, (ids != PAD).long())
        assert (ids[:, 0] == WORDS.index("[CLS]")).all()
        last = attention.sum(1) - 1
        assert (ids[torch.arange(len(ids)), last] == WORDS.index("[SEP]")).all()
        sizes.append(ids.numel())

    model.register_forward_pre_hook(look, with_kwargs=True)
    found = {}
    for batch_tokens in (1, 30, 10_000):
        sizes.clear()
        found[batch_tokens] = MaskedLanguageModel(model, cut, batch_tokens=batch_tokens).estimate(TEXTS)
        assert max(sizes) <= max(batch_tokens, 2 + max(LENGTHS))
        assert len(sizes) == {1: 8 * 16 * 4, 10_000: 1 + 2}.get(batch_tokens, len(sizes))
    for one in found.values():
        np.testing.assert_allclose(one.score, found[10_000].score, rtol=0, atol=1e-10)
        assert list(one.n_tokens) == LENGTHS


def test_head_that_cannot_be_found():
    model, cut = network(), tokenizer()
    truth = MaskedLanguageModel(model, cut).score_samples(TEXTS)
    model.get_output_embeddings = lambda: None
    np.testing.assert_allclose(
        MaskedLanguageModel(model, cut).score_samples(TEXTS), truth, rtol=0, atol=1e-10
    )


def test_single_precision():
    model, cut = network(), tokenizer()
    double = MaskedLanguageModel(model, cut).estimate(TEXTS)
    single = MaskedLanguageModel(model.float(), cut).estimate(TEXTS)
    np.testing.assert_allclose(single.score, double.score, rtol=1e-5, atol=0)


def test_token_ids_in_place_of_texts():
    lm = MaskedLanguageModel(network(), tokenizer())
    ids = lm.tokenizer(TEXTS)["input_ids"]
    longest = max(map(len, ids))
    padded = torch.tensor([i + [PAD] * (longest - len(i)) for i in ids])
    truth = lm.score_samples(TEXTS)
    for texts in (ids, padded, [torch.tensor(i) for i in ids]):
        np.testing.assert_array_equal(lm.score_samples(texts), truth)


def test_models_that_look_at_padding():
    more = {"tpu_short_seq_length": 8, "num_attention_heads": 2}
    lm = MaskedLanguageModel(network("FNet", **more), tokenizer())
    with pytest.raises(ValueError, match="FNetForMaskedLM looks at padding .* set batch_tokens=1"):
        lm.pseudo_log_likelihood(TEXTS)
    lm.batch_tokens = 1
    found = lm.pseudo_log_likelihood(TEXTS)
    np.testing.assert_allclose(found[:1], lm.pseudo_log_likelihood(TEXTS[:1]), rtol=0, atol=1e-10)


def test_missing_and_unknown_tokens():
    model, cut = network(), tokenizer()
    lm = MaskedLanguageModel(model, cut)
    found = lm.estimate(["the [MASK] sat", "the zebra"], masks=EveryMask(), n_replicates=1)
    assert list(found.n_tokens) == [2, 2]
    ids = cut("the [MASK] sat")["input_ids"]
    assert ids[2] == MASK
    hand = np.mean([along(model, ids, order) for order in ([1, 3], [3, 1])])
    unknown = cut("the zebra")["input_ids"]
    assert unknown[2] == WORDS.index("[UNK]")
    np.testing.assert_allclose(found.score, [hand, all_orders(model, unknown).mean()], rtol=0, atol=1e-10)


def test_dropout_is_off_and_comes_back():
    model, cut = network(), tokenizer()
    truth = MaskedLanguageModel(model, cut).score_samples(TEXTS)
    model.train()
    model.cls.eval()
    np.testing.assert_array_equal(MaskedLanguageModel(model, cut).score_samples(TEXTS), truth)
    assert model.training and model.bert.training and not model.cls.training


def test_masked_curve():
    model, cut = network(), tokenizer()
    lm, text = MaskedLanguageModel(model, cut), TEXTS[0]
    rates = np.arange(1, 5) / 4
    curve = lm.masked_curve([text], rates, n_replicates=300)
    ids = cut(text)["input_ids"]
    for m, mean, se in zip(range(1, 5), curve.mean, curve.se, strict=True):
        hidden = itertools.combinations(range(1, 5), m)
        truth = np.mean([np.mean(list(by_hand(model, ids, list(h)).values())) for h in hidden])
        assert abs(mean - truth) < 4 * se + 1e-10
    assert curve.se[-1] < 1e-10 < curve.se[0]
    # everything hidden: texts weigh as much as they have tokens
    marginal = [
        np.sum(list(by_hand(model, i, list(range(1, len(i) - 1))).values())) for i in cut(TEXTS)["input_ids"]
    ]
    whole = lm.masked_curve(TEXTS, [1.0], n_replicates=2)
    assert whole.area == pytest.approx(sum(marginal) / sum(LENGTHS), abs=1e-10)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    shown = MaskedCurveDisplay(curve).plot()
    assert "a token" in shown.ax_.get_title() and "share" in shown.ax_.get_xlabel()
    pyplot.close("all")
    for wrong in ([], [0.0, 0.5], [0.5, 0.2], [0.5, 1.1]):
        with pytest.raises(ValueError, match="rates must rise"):
            lm.masked_curve(TEXTS, wrong)


@pytest.mark.slow
def test_comparison():
    cut = tokenizer()
    models = {str(s): MaskedLanguageModel(network(seed=s), cut) for s in range(3)}
    models["again"] = MaskedLanguageModel(network(seed=1), cut, batch_tokens=20)
    table = compare_language_models(models, TEXTS, n_replicates=4, random_state=5)
    found = {name: m.estimate(TEXTS, n_replicates=4, random_state=5) for name, m in models.items()}
    assert table.lml.is_monotonic_decreasing
    for name, one in found.items():
        assert table.lml[name] == pytest.approx(one.total, abs=1e-10)
        assert table.se[name] == pytest.approx(one.se, abs=1e-10)
    assert table.lml["1"] == pytest.approx(table.lml["again"], abs=1e-10)
    best, worst = found[table.index[0]], found[table.index[-1]]
    pair = worst.score - best.score
    assert table.dse.iloc[-1] == pytest.approx(len(TEXTS) ** 0.5 * pair.std(ddof=1), abs=1e-10)
    assert table.weight.isna().all()  # a network's parameters are point estimates
    with_itself = compare_language_models({"a": models["1"], "b": models["again"]}, TEXTS, random_state=None)
    assert with_itself.lml_diff.abs().max() < 1e-10 and with_itself.mc_dse.max() < 1e-10
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    assert "area" in RankingDisplay(table).plot().ax_.get_xlabel()
    pyplot.close("all")


def test_comparison_of_other_tokens_is_refused():
    words = [w for w in WORDS if w != "##s"] + ["cats"]
    models = {
        "sub-words": MaskedLanguageModel(network(), tokenizer()),
        "words": MaskedLanguageModel(network(seed=1), tokenizer(words)),
    }
    with pytest.raises(
        ValueError, match="'words' split the texts into other tokens than the tokenizer of 'sub-words'"
    ):
        compare_language_models(models, TEXTS)
    assert len(compare_language_models(models, ["the dog"])) == 2  # the same tokens under other numbers
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_language_models({}, TEXTS)


def test_what_is_refused():
    lm = MaskedLanguageModel(network(), tokenizer())
    for masks in (LeaveOneOut(), FixedRate()):
        with pytest.raises(ValueError, match="whose expected score is the log marginal"):
            lm.score_samples(TEXTS, masks=masks)
        with pytest.raises(ValueError, match="whose expected score is the log marginal"):
            compare_language_models({"a": lm}, TEXTS, masks=masks)
    with pytest.raises(ValueError, match="a list of at least one"):
        lm.score_samples("the cat")
    with pytest.raises(ValueError, match="a list of at least one"):
        lm.score_samples([])
    for empty in ("", "[MASK]", [2, 3]):
        with pytest.raises(ValueError, match="text 1 has no token to score"):
            lm.score_samples(["the cat", empty])
    with pytest.raises(ValueError, match="token ids must be in 0..11: text 0"):
        lm.score_samples([[2, 12, 3]])
    with pytest.raises(ValueError, match="n_replicates must be at least 1"):
        lm.score_samples(TEXTS, n_replicates=0)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1"):
        MaskedLanguageModel(lm.model, lm.tokenizer, batch_tokens=0).score_samples(TEXTS)


@pytest.mark.parametrize("kind, limit", [("Bert", 16), ("Roberta", 16 - PAD - 1), ("RoFormer", 16)])
def test_over_long_texts_name_the_limit(kind, limit):
    lm = MaskedLanguageModel(network(kind), tokenizer())
    assert np.isfinite(lm.score_samples(["cat " * (limit - 2)], n_replicates=1)).all()
    with pytest.raises(
        ValueError, match=f"text 1 has {limit + 1} tokens .* the limit of {kind}.* is {limit}:"
    ):
        lm.score_samples(["cat", "cat " * (limit - 1)])
    lm = MaskedLanguageModel(network(kind), tokenizer(model_max_length=5))
    with pytest.raises(ValueError, match="is 5:"):
        lm.score_samples(["the cat sat on"])


def test_tokenizers_that_do_not_fit():
    cut = tokenizer()
    cut.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageModel(network(), cut).score_samples(TEXTS)
    for size in (len(WORDS) - 1, len(WORDS) + 1):
        with pytest.raises(ValueError, match=f"12 tokens and the model's embedding {size} rows"):
            MaskedLanguageModel(network(vocab_size=size), tokenizer()).score_samples(TEXTS)
    # an embedding of a round size, as many are
    many = WORDS + [f"w{i}" for i in range(300)]
    MaskedLanguageModel(network(vocab_size=len(many) + 3), tokenizer(many)).score_samples(TEXTS)


def test_pretrained_antibody_model():
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    pytest.importorskip("matplotlib")
    import masked_curve_language_model as example

    weights = example.checkpoint()
    if weights is None:
        pytest.skip("the pretrained model comes with sapiens 1.0.5")
    cut, texts = example.tokenizer(), list(example.CHAINS.values())[:2]
    models = {
        "pretrained": MaskedLanguageModel(example.network(weights), cut),
        "fresh": MaskedLanguageModel(example.network(), cut),
    }
    n = sum(map(len, texts))
    table = compare_language_models(models, texts, n_replicates=2)
    assert list(table.index) == ["pretrained", "fresh"]
    assert table.lml["fresh"] / n == pytest.approx(-math.log(25), abs=0.1)  # it knows nothing
    assert table.lml["pretrained"] / n > -1.5
    assert models["pretrained"].pseudo_log_likelihood(texts).sum() > table.lml["pretrained"]
    with pytest.raises(ValueError, match="is 144:"):  # of 146 places two are not for tokens
        models["fresh"].score_samples(["A" * 143])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["dog", None], "text 1 is None: leave missing texts out"),
        (["dog", float("nan")], "text 1 is nan"),
        ([("the cat", "dog")], "text 0 is 2 strings"),
        ([b"dog"], "text 0 is b'dog'"),
        ([[2.0, 6.0, 3.0]], "text 0 is float64"),
        ([[True, False]], "text 0 is bool"),
        ([7], r"text 0 is int64 of shape \(\)"),
        ([[[2, 6, 3]]], r"text 0 is int64 of shape \(1, 3\)"),
        ({"dog": 1}, "got dict"),
        (pd.DataFrame({"text": ["dog"]}), "got a DataFrame: pass the column"),
        (None, "a list of at least one"),
        (7, "a list of at least one"),
    ],
)
def test_what_is_no_text(texts, words):
    lm = MaskedLanguageModel(network(), tokenizer())
    for ask in (lm.score_samples, lm.pseudo_log_likelihood, lm.masked_curve):
        with pytest.raises((ValueError, TypeError), match=words):
            ask(texts)
    with pytest.raises((ValueError, TypeError), match=words):
        compare_language_models({"a": lm}, texts)


def test_tokenized_texts_are_no_texts():
    lm = MaskedLanguageModel(network(), tokenizer())
    for tensors in ("pt", None):
        with pytest.raises(TypeError, match="got BatchEncoding: pass the texts themselves"):
            lm.score_samples(lm.tokenizer(TEXTS, padding=True, return_tensors=tensors))
    with pytest.raises(ValueError, match="text 1 is a BatchEncoding"):
        lm.score_samples(["dog", lm.tokenizer("dog")])


def test_texts_in_other_containers():
    lm = MaskedLanguageModel(network(), tokenizer())
    want = lm.score_samples(TEXTS)
    for texts in (tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS, index=[3, 1, 4, 2]), iter(TEXTS)):
        np.testing.assert_array_equal(lm.score_samples(texts), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_causal_models_are_refused(kind, dtype):
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=len(WORDS),
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.BertLMHeadModel(
            transformers.BertConfig(
                vocab_size=len(WORDS),
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                is_decoder=True,
            )
        )
    with pytest.raises(ValueError, match=f"{type(model).__name__} is a causal language model"):
        MaskedLanguageModel(model.to(dtype), tokenizer()).score_samples(TEXTS)


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
def test_models_without_logits_of_tokens_are_refused(kind):
    model = getattr(transformers, kind)(network().config)
    with pytest.raises(ValueError, match=f"{kind} is no masked language model.*AutoModelForMaskedLM"):
        MaskedLanguageModel(model, tokenizer()).score_samples(TEXTS)


def test_a_model_of_ones_own_is_looked_at():
    """One that is not of transformers, with a look to both sides."""
    inner = network()

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    found = [MaskedLanguageModel(m, tokenizer()).score_samples(TEXTS) for m in (Own().eval(), inner)]
    np.testing.assert_array_equal(*found)
