"""The contrastive head of `MaskedTransformer` against its softmax head: cost of a step, what is learnt of real text.

steps: time of the CPU and memory of one step, width 64, two layers, rows of 32 tokens of which half are hidden, codes
drawn evenly from V (so that hardly one repeats), against V and the number K of hidden cells; heads interleaved. Memory
is the peak of a process of its own above what it holds before the step (forward and backward, no optimiser; Linux
only): it contains the gradient of the embedding. Then the heads alone: cross-entropy of K x V logits, of K x K
(`contrastive_loss`, as published), and of K against the different codes among them, which is what the head computes.
Asked: flat in V but for the embedding's own gradient and optimiser, and a crossover where K is about V.

text: words of a text as codes, the most frequent V - 1 and one for all others, rows of 16 words in a row, blocks of
rows held out. Cross-entropy in nats a hidden word over masks of all sizes after a budget of seconds of the CPU, each
head from the frequencies of words on, with the learning rate that a seed of its own found best (`--tune`). The
contrastive head is read out as e'h, as e'h + log q (q as learnt, and counted), and after its last tenth of tokens, or
of time, was given to the softmax loss.
`--text FILE` is any plain text; the figures are from the King James Bible, Debian's bible-kjv:

    bible -f -p usr/lib 'gen1:1-rev22:21' > kjv.txt

Found, with other jobs on both cores. CPU time of a step, softmax against contrastive: 1.1, 1.2, 1.1 times at V = 1024
(K = 64, 512, 2048), 2.7, 15 and 34 times at 131 072, where the softmax of K = 512 and 2048 computes its logits twice to
bound its memory (a bare cross-entropy of K x V logits takes 880 and 3364 ms, so about 9 and 20 times would be left).
Loss and gradient alone take 5.4 to 23, 16 to 36 and 73 to 100 ms from first to last V; Adam over the whole table adds
78 ms at the last: the step as a whole is not flat. Memory grows by 35, 36 and 86 MB, the gradient of the table being 34
(at K = 2048 codes also repeat less). Even at V = 1024 (spreads hold 1) and no crossover, equal negatives being summed;
K x K logits as published cross at V = 2500 for K = 2048.

King James Bible, V = 8192, three seeds, nats a held-out word after 40 s of CPU: 5.62 softmax (5.57 with biases held),
4.87 contrastive with e'h + log q (ahead by 0.64 to 0.91 in every seed), 7.47 with e'h alone, 4.89 after a softmax end,
which gives nothing. At equal tokens (0.6 million words) 5.48 against 5.62 (0.10 to 0.17 ahead), but even later: one
seed of the softmax head, biases held, `--longer 2459744`, needs 166 s for the words that the contrastive head saw in
40, and is at 4.86 against 4.85. The pictures are in headless.png.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from torch.nn import functional as F

from bayes_mpt.masks import FixedRate, UniformSize
from bayes_mpt.models import MaskedTransformer, contrastive_loss
from bayes_mpt.score import CumulativeMaskedScore

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run, spread

HEADS = ("softmax", "contrastive")
STEP_TOKENS, WIDTH = 32, 64
N_WORDS, N_TOKENS, BATCH = 8192, 16, 64
RATES = {"softmax": 1e-3, "contrastive": 1e-3}  # found by --tune
LAST = 0.1  # share of tokens, or time, that goes to the softmax loss after a contrastive training
MARKS = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the budget, when held-out rows are looked at


# ------------------------------------------------------------------------------------------------------------- steps


def prepared(head, n_codes, k, seed=0):
    """Loss, Adam and a batch with exactly k hidden cells."""
    torch.manual_seed(seed)
    x = torch.randint(n_codes, (2 * k // STEP_TOKENS, STEP_TOKENS)).float()
    program = MaskedTransformer(WIDTH, n_levels=n_codes, head=head)
    loss = CumulativeMaskedScore(FixedRate(0.5, 16), random_state=0)(program, None, x[:2])
    return loss, torch.optim.Adam(loss.parameters(), lr=1e-3), x


def peak(head, n_codes, k):
    """Bytes that a step takes at most above what was there before; in a process of its own."""

    def work(out):
        loss, _, x = prepared(head, n_codes, k)
        loss(x[:2]).backward()  # what is made once
        loss.zero_grad()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        loss(x).backward()
        out.put(resident("VmHWM") - before)

    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=work, args=(out,))
    process.start()
    found = out.get()
    process.join()
    return found


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def steps(report, sizes, counts, repeats):
    found = {}
    for n_codes in sizes:
        for k in counts:
            cases = {head: prepared(head, n_codes, k) for head in HEADS}
            seconds = {(head, part): [] for head in HEADS for part in ("loss", "whole")}
            for i in range(repeats + 1):
                for head in HEADS if i % 2 else HEADS[::-1]:
                    loss, adam, x = cases[head]
                    with pyro.validation_enabled(False):
                        start = time.process_time()
                        adam.zero_grad()
                        loss(x).backward()
                        middle = time.process_time()
                        adam.step()
                    if i:  # the first warms up
                        seconds[head, "loss"].append(middle - start)
                        seconds[head, "whole"].append(time.process_time() - start)
            del cases, loss, adam, x
            ratios = np.divide(seconds["softmax", "whole"], seconds["contrastive", "whole"])
            memory = {head: peak(head, n_codes, k) / 1e6 for head in HEADS}
            report.row(
                V=n_codes,
                K=k,
                **{f"{head}, ms": spread([1e3 * s for s in seconds[head, "whole"]]) for head in HEADS},
                **{
                    f"{head} without Adam, ms": float(1e3 * np.median(seconds[head, "loss"]))
                    for head in HEADS
                },
                ratio=spread(list(ratios)),
                **{f"{head}, MB": memory[head] for head in HEADS},
                embedding_MB=4e-6 * n_codes * WIDTH,
                seconds={f"{head} {part}": value for (head, part), value in seconds.items()},
            )
            for head in HEADS:
                found[head, n_codes, k] = {
                    "whole": float(np.median(seconds[head, "whole"])),
                    "loss": float(np.median(seconds[head, "loss"])),
                    "memory": memory[head],
                }
            found["ratio", n_codes, k] = float(np.median(ratios))
    return found


def heads_alone(report, sizes, counts, repeats):
    """Forward and backward of the loss alone, gradient of the embedding included; crossovers of K x K against K x V."""
    ratio = {}
    for n_codes in sizes:
        for k in counts:
            torch.manual_seed(0)
            h, e = torch.randn(k, WIDTH, requires_grad=True), torch.randn(n_codes, WIDTH, requires_grad=True)
            code = torch.randint(n_codes, (k,))

            def by_distinct(h=h, e=e, code=code):
                distinct, which, count = code.unique(return_inverse=True, return_counts=True)
                logits = h @ F.embedding(distinct, e).mT + count.log()
                return F.cross_entropy(logits, which)

            losses = {
                "K x V": lambda h=h, e=e, code=code: F.cross_entropy(h @ e.mT, code),
                "K x K": lambda h=h, e=e, code=code: contrastive_loss(h, F.embedding(code, e)),
                "K x distinct": by_distinct,
            }
            calls = {
                name: lambda f=f, h=h, e=e: torch.autograd.grad(f(), (h, e)) and None
                for name, f in losses.items()
            }
            timings = interleave(calls, repeats)
            cpu = {name: 1e3 * float(np.median(t.cpu)) for name, t in timings.items()}
            ratio[n_codes, k] = cpu["K x V"] / cpu["K x K"]
            report.row(
                V=n_codes,
                K=k,
                distinct=len(code.unique()),
                **{f"{name}, ms": value for name, value in cpu.items()},
                ratio=ratio[n_codes, k],
            )
    return ratio


def crossover(ratio, sizes, k):
    """V at which both take as long, between the sizes measured."""
    values = [np.log(ratio[v, k]) for v in sizes]
    if values[0] > 0:
        return f"below {sizes[0]}"
    if values[-1] < 0:
        return f"above {sizes[-1]}"
    return f"{np.exp(np.interp(0, values, np.log(sizes))):.0f}"


# -------------------------------------------------------------------------------------------------------------- text


def read_text(file):
    """Codes of the words (rows, N_TOKENS), those that train and those held out; 0 is any other word."""
    lines = file.read_text(errors="replace").splitlines()
    words = re.findall(r"[a-z']+", " ".join(re.sub(r"^\S+\d+:\d+ ", "", line) for line in lines).lower())
    known = [word for word, _ in Counter(words).most_common(N_WORDS - 1)]
    code = {word: i + 1 for i, word in enumerate(known)}
    stream = np.array([code.get(word, 0) for word in words], dtype=np.float32)
    rows = torch.as_tensor(stream[: len(stream) // N_TOKENS * N_TOKENS].reshape(-1, N_TOKENS))
    fresh = torch.arange(len(rows)) // 25 % 40 == 20  # a block of 25 rows in 40
    return rows[~fresh], rows[fresh], len(set(words))


def frequencies(rows):
    """Their logarithms (V,), half a word added to each."""
    count = torch.bincount(rows.flatten().long(), minlength=N_WORDS) + 0.5
    return (count / count.sum()).log()


class Training:
    """A head in training by the clock of the CPU and by tokens; looks at held-out rows are not timed."""

    def __init__(self, head, seed, rows, rate=None, biases_held=False):
        torch.manual_seed(seed)
        program = MaskedTransformer(WIDTH, n_levels=N_WORDS, head=head)
        self.loss = CumulativeMaskedScore(random_state=seed)(program, None, rows[:64])
        leaves = self.loss.named_leaves()
        with torch.no_grad():  # both from the frequencies in all rows, as `BayesMPT.fit` begins
            bias = leaves["unigram" if head == "contrastive" else "bias"]
            bias.copy_(frequencies(rows).expand_as(bias))
        bias.requires_grad_(not biases_held)
        self.adam = torch.optim.Adam(self.loss.parameters(), lr=RATES[head] if rate is None else rate)
        self.rows, self.seed, self.head = rows, seed, head
        self.seconds, self.tokens = 0.0, 0
        self.batches = self._batches()

    def _batches(self):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.rows), generator=generator).split(BATCH)

    def until(self, seconds=np.inf, tokens=np.inf):
        with pyro.validation_enabled(False):
            while self.seconds < seconds and self.tokens < tokens:
                x = self.rows[next(self.batches)]
                start = time.process_time()
                self.adam.zero_grad()
                (self.loss(x) / len(x)).backward()
                self.adam.step()
                self.seconds += time.process_time() - start
                self.tokens += x.numel()
        return self

    def missed(self, fresh, bias=None):
        """Cross-entropy in nats a word; with another vector (V,) of biases."""
        leaves = self.loss.named_leaves()
        name = "unigram" if self.head == "contrastive" else "bias"
        kept, training = leaves[name].detach().clone(), self.loss.loss
        self.loss.loss = CumulativeMaskedScore(UniformSize(64), random_state=0)
        with torch.no_grad(), pyro.validation_enabled(False):
            if bias is not None:
                leaves[name].copy_(bias.expand_as(kept))
            total = sum(float(self.loss(part)) for part in fresh.split(512))
            leaves[name].copy_(kept)
        self.loss.loss = training
        return total / fresh.numel()

    def tuned_on(self, rate):
        """The same network, from here on with the softmax loss, biases at log q."""
        new = Training("softmax", self.seed, self.rows, rate)
        ours = self.loss.named_leaves()
        with torch.no_grad():
            for name, leaf in new.loss.named_leaves().items():
                leaf.copy_(ours["unigram"].log_softmax(1).expand_as(leaf) if name == "bias" else ours[name])
        new.seconds, new.tokens = self.seconds, self.tokens
        return new


def text(report, rows, fresh, seconds, seeds):
    log_q = frequencies(rows)
    unigram = -float(log_q[fresh.long()].mean())
    report.note(f"frequencies of words alone: {unigram:.3f} nats a word")
    curves, at_end = [], []
    for seed in seeds:
        found = {}

        def look(kind, training, name="log q as learnt", bias=None, seed=seed, found=found):
            value = training.missed(fresh, bias)
            report.row(
                seed=seed,
                head=training.head,
                when=kind,
                read_out=name if training.head == "contrastive" else "softmax",
                nats_a_word=value,
                cpu_seconds=training.seconds,
                tokens=training.tokens,
            )
            found[kind, name if training.head == "contrastive" else "softmax"] = value
            return value

        softmax = Training("softmax", seed, rows)
        for mark in MARKS:
            softmax.until(seconds * mark)
            curves.append(
                ("softmax", seed, softmax.seconds, softmax.tokens, look(f"{mark:g} of time", softmax))
            )
        # a bias for every word and column is much to learn: without them the softmax head may do better
        held = Training("softmax", seed, rows, biases_held=True).until(seconds)
        found["held"] = look("equal time, biases held at log q", held)
        tokens = softmax.tokens
        ours = Training("contrastive", seed, rows)
        plan = sorted(
            [("seconds", seconds * m, f"{m:g} of time") for m in MARKS[:-1]]
            + [("seconds", seconds * (1 - LAST), "")]
            + [("seconds", seconds, "equal time")],
            key=lambda p: p[1],
        )
        ours.until(tokens=(1 - LAST) * tokens)
        if ours.seconds < seconds:
            branch = ours.tuned_on(RATES["softmax"] / 3)
            branch.until(tokens=tokens)
            found["equal tokens", "tuned"] = look("equal tokens, last tenth softmax", branch)
        ours.until(tokens=tokens)
        for name, bias in (("e'h", torch.zeros(1)), ("log q as learnt", None), ("log q counted", log_q)):
            look("equal tokens", ours, name, bias)
        value = found["equal tokens", "log q as learnt"]
        curves.append(("contrastive", seed, ours.seconds, ours.tokens, value))
        for _, when, kind in plan:
            if when < ours.seconds:
                continue
            ours.until(when)
            if not kind:
                branch = ours.tuned_on(RATES["softmax"] / 3)
                branch.until(seconds)
                found["equal time", "tuned"] = look("equal time, last tenth softmax", branch)
            elif kind == "equal time":
                for name, bias in (
                    ("e'h", torch.zeros(1)),
                    ("log q as learnt", None),
                    ("log q counted", log_q),
                ):
                    look(kind, ours, name, bias)
            else:
                look(kind, ours)
            if kind:
                key = (kind, "log q as learnt")
                curves.append(("contrastive", seed, ours.seconds, ours.tokens, found[key]))
        found["softmax"] = found["1 of time", "softmax"]
        at_end.append(found)
    for when in ("equal tokens", "equal time"):
        lines = []
        for name in ("e'h", "log q as learnt", "log q counted", "tuned"):
            more = [f[when, name] - f["softmax"] for f in at_end if (when, name) in f]
            if more:
                lines.append(f"{name} {np.mean(more):+.3f} ({min(more):+.3f} to {max(more):+.3f})")
        report.note(
            f"at {when}, nats a word more than the softmax head ({np.mean([f['softmax'] for f in at_end]):.3f}): "
            + ", ".join(lines)
        )
    report.note(
        "softmax head whose biases stay at log q, at equal time: "
        + spread([f["held"] - f["softmax"] for f in at_end])
        + " nats a word more"
    )
    ahead = [min(f["softmax"], f["held"]) - f["equal time", "tuned"] for f in at_end]
    report.target(
        "at equal time the contrastive head with a softmax end is ahead", min(ahead) > 0, spread(ahead)
    )
    ahead = [f["softmax"] - f["equal tokens", "log q as learnt"] for f in at_end]
    report.target("at equal tokens e'h + log q is no worse", min(ahead) > -0.01, spread(ahead))
    return curves, unigram


def tune(rows, fresh, seconds):
    for head in HEADS:
        for rate in (3e-4, 1e-3, 2e-3, 3e-3):
            found = Training(head, 100, rows, rate).until(seconds)
            print(f"{head} {rate:g}: {found.missed(fresh):.4f}, {found.tokens} tokens", flush=True)


def longer(rows, fresh, tokens):
    """The softmax head, biases held, for as many tokens as the contrastive one sees in its time."""
    training = Training("softmax", 0, rows, biases_held=True)
    for share in (0.25, 0.5, 0.75, 1.0):
        training.until(tokens=share * tokens)
        print(
            f"softmax, biases held: {training.missed(fresh):.4f} nats a word after {training.tokens} words, "
            f"{training.seconds:.1f} s",
            flush=True,
        )


def draw(found, sizes, counts, curves, unigram):
    figure, axes = plt.subplots(
        1, 2 + bool(curves), figsize=(4.3 * (2 + bool(curves)), 3.6), layout="constrained"
    )
    for head, style in zip(HEADS, ("o-", "s--"), strict=True):
        for k, colour in zip(counts, ("C0", "C1", "C2"), strict=False):
            label = f"{head}, K = {k}"
            for ax, what, scale in ((axes[0], "whole", 1e3), (axes[1], "memory", 1)):
                ax.loglog(
                    sizes, [scale * found[head, v, k][what] for v in sizes], style, color=colour, label=label
                )
    axes[1].loglog(sizes, [4e-6 * v * WIDTH for v in sizes], "k:", label="the embedding")
    axes[0].set(xlabel="vocabulary V", ylabel="ms of CPU", title="A step with Adam")
    axes[1].set(xlabel="vocabulary V", ylabel="MB", title="Peak memory of its loss and gradient")
    axes[1].legend(fontsize=7)
    if curves:
        for head, colour in zip(HEADS, ("C3", "C0"), strict=True):
            for seed in sorted({c[1] for c in curves}):
                line = [(c[2], c[4]) for c in curves if c[:2] == (head, seed)]
                axes[2].plot(*zip(*line, strict=True), "o-", color=colour, label=None if seed else head)
        axes[2].axhline(unigram, color="k", ls=":", label="frequencies alone")
        axes[2].set(xlabel="seconds of CPU", ylabel="nats a word", title=f"Held-out words, V = {N_WORDS}")
        axes[2].legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def main(report: Report, args):
    sizes = (1024, 4096) if args.quick else (1024, 8192, 32768, 131072)
    counts = (64, 512) if args.quick else (64, 512, 2048)
    corpus = None
    if args.text is not None and args.text.exists():
        rows, fresh, n_known = read_text(args.text)
        corpus = rows, fresh
        report.note(
            f"{rows.numel()} words train, {fresh.numel()} are held out, {n_known} different ones; share of others "
            f"{float((fresh == 0).double().mean()):.4f}"
        )
    else:
        report.note(f"text: skipped, no file {args.text}: see --help")
    if args.tune or args.longer:
        assert corpus is not None, "--tune and --longer need --text"
        if args.tune:
            tune(*corpus, args.seconds)
        else:
            longer(*corpus, args.longer)
        raise SystemExit  # nothing to store
    found = steps(report, sizes, counts, args.repeats or (2 if args.quick else 5))
    alone = heads_alone(report, sizes, counts, args.repeats or (3 if args.quick else 5))
    for name, ratio in (
        ("whole steps", {(v, k): found["ratio", v, k] for v in sizes for k in counts}),
        ("losses alone, K x K against K x V", alone),
    ):
        where = ", ".join(f"K = {k}: V {crossover(ratio, sizes, k)}" for k in counts)
        report.note(f"{name} take as long where {where}")
    for k in counts:
        first, last = (found["contrastive", v, k] for v in (sizes[0], sizes[-1]))
        table = 4e-6 * WIDTH * (sizes[-1] - sizes[0])
        report.note(
            f"contrastive head, K = {k}, V = {sizes[0]} and {sizes[-1]}: {1e3 * first['loss']:.1f} and "
            f"{1e3 * last['loss']:.1f} ms without Adam, {1e3 * first['whole']:.1f} and {1e3 * last['whole']:.1f} with "
            f"it; {first['memory']:.0f} and {last['memory']:.0f} MB, each copy of the embedding {table:.0f} MB more"
        )
    curves, unigram = [], None
    if corpus is not None:
        seconds, seeds = (4.0, range(1)) if args.quick else (args.seconds, range(args.seeds))
        curves, unigram = text(report, *corpus, seconds, seeds)
    if not args.quick:
        draw(found, sizes, counts, curves, unigram)


def arguments(parser):
    parser.add_argument("--text", type=Path, help="plain text; without it that part is skipped")
    parser.add_argument("--seconds", type=float, default=40.0, help="of CPU time a training (default 40)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="try learning rates on the text; stores nothing")
    parser.add_argument("--longer", type=int, help="train the softmax head on so many words; stores nothing")


if __name__ == "__main__":
    run(main, __file__, __doc__, arguments)
