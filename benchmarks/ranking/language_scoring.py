"""Masked language models: speed and memory of scoring in batches, and what a ranking by area is worth.

Speed: `MaskedLanguageModel.estimate` against the loop that one writes by hand, one masked copy of one text a run of the
model, on the same draws of masks; tokens of masked copies a second, special ones included, padding not. Three cases:
the antibody model of `examples/masked_curve_language_model.py` on heavy chains of like length (as initialised where its
weights are not installed: the time is the same), a small BERT with 30 522 words on texts of 4 to 60 tokens, and a tiny
one. Asked: the same totals, faster in every case.

Memory: the greatest resident memory beyond that before, for few and for ten times as many texts, by `batch_tokens`.
Asked: no more than a tenth more for ten times as many.

Ranking: eight tiny BERTs trained shorter or longer, wider or narrower, at all mask sizes or at 15 %, on texts of 12
tokens from a hidden Markov chain whose log-density is known. On fresh texts: area (its own masks), log-density of the
mixture of 64 random orders, truth. Asked: the same ranking by both, on each of three sets of 300 fresh texts (the last
is shown).

Found, on one of two Xeon cores that other jobs shared. Tokens a second of CPU time: antibody model of 0.57 million
parameters 50 600 against 32 700 (1.55 times), BERT 256 x 4 with 30 522 words 6 090 against 2 560 (2.4), BERT 32 x 2
with 105 words 286 000 against 40 500 (7.0); totals equal to 1.4e-9 of themselves. Ten times as many texts take 1.09
times the memory (125 MB with `batch_tokens=1024`, 471 with 4096). The ranking falls short: Kendall's tau 0.79, 0.79 and
0.86 on the three sets (a model trained at 15 % whose orders disagree by 1.5 nats); 0.90, 0.90 and 1 among the seven
trained at all mask sizes, where one pair is within 0.03 nats a text by area.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from bayes_mpt.language import MaskedLanguageModel
from bayes_mpt.masks import FixedRate, PermutationChain, UniformSize

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from masked_curve_language_model import CHAINS, checkpoint, network, tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 2, 3, 4
LENGTH, LETTERS, STATES, N_ORDERS, N_SETS = 12, 6, 4, 64, 3


def words(n):
    return BertTokenizer(vocab={w: i for i, w in enumerate([*SPECIAL, *(f"w{i}" for i in range(n - 5))])})


def bert(n_words, width, layers, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=n_words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if width < 64 else width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).eval()


def random_texts(n, n_words, shortest, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [CLS, *rng.integers(5, n_words, rng.integers(shortest, longest + 1)).tolist(), SEP] for _ in range(n)
    ]


# ---------------------------------------------------------------------------------------------------------- speed


@torch.no_grad()
def one_by_one(model, mask_token, texts, policy, n_replicates):
    """The loop; texts are token ids with one special token at each end. Total nats by replicate."""
    generator, total = torch.Generator().manual_seed(0), np.zeros(n_replicates)
    for ids in sorted(texts, key=lambda t: -len(t)):
        truth = torch.tensor(ids)
        for r in range(n_replicates):
            visible, _, weight = policy.draw(len(ids) - 2, generator)
            for shown, w in zip(visible, weight, strict=True):
                place = 1 + (~shown).nonzero()[:, 0]
                hidden = truth.clone()
                hidden[place] = mask_token
                log_prob = model(input_ids=hidden[None]).logits[0, place].log_softmax(-1)
                found = log_prob.gather(1, truth[place][:, None])[:, 0].double()
                total[r] += float(found @ w[place - 1])
    return total


def speed(report, args):
    policy, n_replicates = UniformSize(8), 2
    cut = tokenizer()
    chains = [cut(c)["input_ids"] for c in CHAINS.values()]
    few = 4 if args.quick else 1
    cases = {
        "antibody model, ten chains of 118 to 124": (network(checkpoint()), cut, chains[::few]),
        "BERT 256 x 4, 30 522 words": (
            bert(30_522, 256, 4),
            words(30_522),
            random_texts(16 // few, 30_522, 4, 60),
        ),
        "BERT 32 x 2, 105 words": (bert(105, 32, 2), words(105), random_texts(64 // few, 105, 4, 60)),
    }
    ratios, apart = {}, 0.0
    for name, (model, cut, texts) in cases.items():
        n_tokens = sum(map(len, texts)) * policy.n_masks * n_replicates
        ours = MaskedLanguageModel(model, cut)
        found = interleave(
            {
                "peer": partial(one_by_one, model, cut.mask_token_id, texts, policy, n_replicates),
                "ours": partial(ours.estimate, texts, masks=policy, n_replicates=n_replicates),
            },
            args.repeats or (1 if args.quick else 5),
        )
        peer, mine = found["peer"], found["ours"]
        difference = float(np.abs(mine.result.diagnostics["totals"] / peer.result - 1).max())
        report.compare(
            name,
            peer,
            mine,
            peer_tokens_a_second=round(n_tokens / float(np.median(peer.cpu))),
            ours_tokens_a_second=round(n_tokens / float(np.median(mine.cpu))),
            relative_difference=difference,
        )
        ratios[name] = float(np.median(peer.cpu) / np.median(mine.cpu))
        apart = max(apart, difference)
    report.target(
        "faster in every case",
        None if args.quick else min(ratios.values()) > 1,
        ", ".join(f"{k}: {v:.2f}" for k, v in ratios.items()) + " times the tokens a second of CPU time",
    )
    report.target("the same totals to 1e-6 of themselves", apart < 1e-6, f"{apart:.1e}")


# --------------------------------------------------------------------------------------------------------- memory


def peak(call):
    """MB of resident memory at the peak, beyond that before."""

    def read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def memory(report, args):
    model, cut = bert(30_522, 64, 1), words(30_522)
    few = 8 if args.quick else 20
    worst = 0.0
    for batch_tokens in (1024, 4096):
        lm = MaskedLanguageModel(model, cut, batch_tokens=batch_tokens)
        lm.estimate(random_texts(2, 30_522, 30, 60), masks=UniformSize(4), n_replicates=2)
        found = [
            peak(partial(lm.estimate, random_texts(n, 30_522, 4, 60), masks=UniformSize(8), n_replicates=2))
            for n in (few, 10 * few)
        ]
        logits = batch_tokens * 30_522 * 4 / 2**20  # of a run in which all is hidden
        report.row(
            batch_tokens=batch_tokens, logits_MB=logits, few_texts_MB=found[0], ten_times_as_many_MB=found[1]
        )
        worst = max(worst, found[1] / found[0])
    report.target("memory set by the batch", worst < 1.1, f"for ten times as many texts {worst:.2f} times")


# -------------------------------------------------------------------------------------------------------- ranking


class HiddenMarkov:
    """Texts of known log-density."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.start = np.full(STATES, 1 / STATES)
        self.move = rng.dirichlet(np.full(STATES, 0.15), STATES)
        self.emit = rng.dirichlet(np.full(LETTERS, 0.15), STATES)

    def sample(self, n, seed):
        rng = np.random.default_rng(seed)

        def draw(p):
            return (p.cumsum(1) < rng.random((len(p), 1))).sum(1).clip(max=p.shape[1] - 1)

        state, letters = draw(np.tile(self.start, (n, 1))), []
        for _ in range(LENGTH):
            letters.append(draw(self.emit[state]))
            state = draw(self.move[state])
        return np.stack(letters, 1)

    def log_prob(self, letters):
        """Forward algorithm: nats a text."""
        belief, total = np.tile(self.start, (len(letters), 1)), np.zeros(len(letters))
        for token in letters.T:
            joint = belief * self.emit[:, token].T
            total += np.log(joint.sum(1))
            belief = (joint / joint.sum(1, keepdims=True)) @ self.move
        return total


def ids(letters):
    ends = [np.full((len(letters), 1), token) for token in (CLS, SEP)]
    return np.hstack([ends[0], letters + 5, ends[1]])


def trained(truth, width, layers, n_steps, policy, seed):
    """Adam on fresh texts, a mask for each row."""
    model = bert(5 + LETTERS, width, layers, seed).train()
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(n_steps):
        x = torch.as_tensor(ids(truth.sample(64, 10_000 * seed + step)))
        visible, _, weight = policy.draw(LENGTH, generator)
        hidden = torch.zeros_like(x, dtype=torch.bool)
        hidden[:, 1:-1] = ~visible
        logits = model(input_ids=x.masked_fill(hidden, MASK)).logits[:, 1:-1]
        log_prob = logits.log_softmax(-1).gather(2, x[:, 1:-1, None])[..., 0]
        loss = -(64 * weight * log_prob).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def ranking(report, args):
    truth = HiddenMarkov(1)
    everything, usual = UniformSize(64), FixedRate(0.15, 64)
    steps = 30 if args.quick else 100
    models = {
        "as initialised": (16, 1, 0, everything),
        "16 x 1, short": (16, 1, steps, everything),
        "16 x 1, medium": (16, 1, 3 * steps, everything),
        "16 x 1, long": (16, 1, 10 * steps, everything),
        "32 x 2, medium": (32, 2, 3 * steps, everything),
        "32 x 2, long": (32, 2, 10 * steps, everything),
        "32 x 2, long, 15 %": (32, 2, 10 * steps, usual),
        "64 x 2, medium": (64, 2, 3 * steps, everything),
    }
    cut = words(5 + LETTERS)
    fresh = [truth.sample(20 if args.quick else 300, 10**8 + s) for s in range(N_SETS)]
    areas, mixtures = np.empty((2, len(models), N_SETS))
    for i, (name, recipe) in enumerate(models.items()):
        lm = MaskedLanguageModel(trained(truth, *recipe, seed=i + 1), cut)
        row = {}
        for s, letters in enumerate(fresh):
            texts = torch.as_tensor(ids(letters))
            area = lm.estimate(texts, masks=UniformSize(12), random_state=1)
            orders = lm.estimate(texts, masks=PermutationChain(), n_replicates=N_ORDERS, random_state=2)
            areas[i, s] = area.total / len(letters)
            mixtures[i, s] = orders.diagnostics["log_mean_exp"] / len(letters)
            row = {
                "area": areas[i, s],
                "se": area.se / len(letters),
                "mixture": mixtures[i, s],
                "order_sd": orders.diagnostics["order_sd"],
            }
        row |= {"areas": areas[i].tolist(), "mixtures": mixtures[i].tolist()}  # of all sets
        report.row(case=name, **row, truth=float(truth.log_prob(fresh[-1]).mean()))
    # along the chains of a model that was trained at 15 % orders differ most, and their mixture gains most
    alike = [i for i, recipe in enumerate(models.values()) if recipe[-1] is everything]
    for kept, of in ((range(len(models)), "all eight"), (alike, "the seven trained at all mask sizes")):
        taus = [float(kendalltau(areas[kept, s], mixtures[kept, s]).statistic) for s in range(N_SETS)]
        report.target(
            f"{of} ranked alike by area and by the mixture of {N_ORDERS} orders",
            None if args.quick else min(taus) == 1,
            "Kendall's tau " + ", ".join(f"{t:.3f}" for t in taus),
        )


def main(report: Report, args):
    speed(report, args)
    memory(report, args)
    ranking(report, args)


if __name__ == "__main__":
    run(main, __file__, __doc__)
