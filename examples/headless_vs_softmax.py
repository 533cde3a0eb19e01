"""Large vocabularies: a contrastive head, whose loss does not grow with the vocabulary, against a softmax.

Words of the docstrings that come with scikit-learn and scipy, rows of 16 in a row, 8192 codes; every eighth module is
held out. First the time of a training step against the number of codes; where that of the contrastive head grows, it is
Adam going over all embeddings. Then both heads are trained for equally many seconds of the CPU, and looked at on
held-out rows: nats a hidden word over masks of all sizes. The contrastive head is read out as e'h + log q, with q the
frequency of a word; e'h alone, printed too, misses what the frequencies tell. One seed, half a minute: a demonstration.
Writes headless_vs_softmax.png.

    python examples/headless_vs_softmax.py [--output DIR]
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from torch import Tensor

from bayes_mpt.masks import UniformSize
from bayes_mpt.models import MaskedTransformer
from bayes_mpt.score import CumulativeMaskedScore

HEADS = {"softmax": "C3", "contrastive": "C0"}
N_CODES, N_TOKENS, BATCH, RATE = 8192, 16, 48, 1e-3
SIZES = (1024, 4096, 16384, 65536)
SECONDS, N_LOOKS, N_FRESH = 15.0, 5, 256


def main(output: Path) -> None:
    torch.set_num_threads(1)
    found = words()
    if found is None:
        print("skipped: scikit-learn and scipy are installed without their sources")
        return
    rows, fresh = found
    steps = {head: [step_time(head, n_codes) for n_codes in SIZES] for head in HEADS}
    for n_codes, a, b in zip(SIZES, *steps.values(), strict=True):
        print(
            f"{n_codes:6d} codes: {1e3 * a:6.1f} ms a step by softmax, {1e3 * b:5.1f} contrastive: {a / b:.1f} times"
        )

    alone = -float(log_shares(rows)[fresh.long()].mean())
    print(f"{rows.numel()} words; frequencies alone give {alone:.3f} nats a held-out word")
    trainings = {head: Training(head, rows) for head in HEADS}
    seen = {head: training.curve(fresh) for head, training in trainings.items()}
    bare = trainings["contrastive"].look(fresh, with_frequencies=False)
    for head, curve in seen.items():
        print(f"{head}: {curve[-1][1]:.3f} nats after {curve[-1][0]:.0f} s, {trainings[head].n_steps} steps")
    print(f"contrastive, e'h alone: {bare:.3f}")
    assert seen["contrastive"][-1][1] < alone < bare

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7), layout="constrained")
    for head, colour in HEADS.items():
        left.loglog(SIZES, [1e3 * s for s in steps[head]], "o-", color=colour, label=head)
        right.plot(*zip(*seen[head], strict=True), "o-", color=colour, label=head)
    right.axhline(alone, color="k", ls=":", label="frequencies alone")
    left.set(
        xlabel="codes", ylabel="ms of CPU", title=f"A step on {BATCH * N_TOKENS} words, half of them hidden"
    )
    left.set_xticks(SIZES, [str(n) for n in SIZES])
    left.minorticks_off()
    left.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    right.set(xlabel="seconds of CPU", ylabel="nats a word", title=f"Held-out words, {N_CODES} codes")
    left.legend()
    right.legend()
    figure.savefig(output / "headless_vs_softmax.png", dpi=120)
    print(f"wrote {output / 'headless_vs_softmax.png'}")


def words() -> tuple[Tensor, Tensor] | None:
    """Codes (rows, N_TOKENS) of the words of docstrings, those that train and those held out; 0 is any rare word."""
    texts = []
    for name in ("sklearn", "scipy"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*.py")):
            if not {"tests", "externals", "_lib"} & set(file.relative_to(folder).parts):
                found = re.findall(r'"""(.*?)"""', file.read_text(errors="replace"), re.DOTALL)
                texts.append(re.findall("[a-z]+", " ".join(found).lower()))
    held = texts[::8]
    train = [text for i, text in enumerate(texts) if i % 8]
    if sum(map(len, train)) < 10**5:
        return None
    code = {
        w: i + 1 for i, (w, _) in enumerate(Counter(w for t in train for w in t).most_common(N_CODES - 1))
    }
    parts = []
    for group in (train, held):
        stream = np.array([code.get(w, 0) for text in group for w in text], dtype=np.float32)
        parts.append(torch.as_tensor(stream[: len(stream) // N_TOKENS * N_TOKENS].reshape(-1, N_TOKENS)))
    rows, fresh = parts
    some = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(0))[:N_FRESH]
    return rows, fresh[some]


def log_shares(rows: Tensor) -> Tensor:
    count = rows.flatten().long().bincount(minlength=N_CODES) + 0.5
    return (count / count.sum()).log()


def step_time(head: str, n_codes: int) -> float:
    """Seconds of the CPU that loss, gradient and Adam take; the fastest of three."""
    x = torch.randint(n_codes, (BATCH, N_TOKENS), generator=torch.Generator().manual_seed(0)).float()
    loss = CumulativeMaskedScore(random_state=0)(MaskedTransformer(n_levels=n_codes, head=head), None, x[:8])
    adam = torch.optim.Adam(loss.parameters(), lr=RATE)
    taken = []
    for _ in range(4):
        start = time.process_time()
        adam.zero_grad()
        loss(x).backward()
        adam.step()
        taken.append(time.process_time() - start)
    return min(taken[1:])


class Training:
    """Steps of one head, timed by the clock of the CPU; looks at held-out rows are not."""

    def __init__(self, head: str, rows: Tensor):
        torch.manual_seed(0)
        self.rows, self.bias = rows, "bias" if head == "softmax" else "unigram"
        program = MaskedTransformer(n_levels=N_CODES, head=head)
        self.loss = CumulativeMaskedScore(random_state=0)(program, None, rows[:8])
        self.adam = torch.optim.Adam(self.loss.parameters(), lr=RATE)
        with torch.no_grad():
            bias = self.loss.named_leaves()[self.bias]
            bias.copy_(log_shares(rows).expand_as(bias))
        self.generator = torch.Generator().manual_seed(0)
        self.seconds, self.n_steps = 0.0, 0

    def curve(self, fresh: Tensor) -> list[tuple[float, float]]:
        """Train for SECONDS; pairs of seconds and nats a word."""
        found = [(0.0, self.look(fresh))]
        for end in np.linspace(0, SECONDS, N_LOOKS + 1)[1:]:
            while self.seconds < end:
                x = self.rows[torch.randint(len(self.rows), (BATCH,), generator=self.generator)]
                start = time.process_time()
                with pyro.validation_enabled(False):
                    self.adam.zero_grad()
                    (self.loss(x) / len(x)).backward()
                    self.adam.step()
                self.seconds += time.process_time() - start
                self.n_steps += 1
            found.append((self.seconds, self.look(fresh)))
        return found

    @torch.no_grad()
    def look(self, fresh: Tensor, with_frequencies: bool = True) -> float:
        """Minus the score a word, on the same masks each time; without log q where that is asked for."""
        leaf, training = self.loss.named_leaves()[self.bias], self.loss.loss
        kept = leaf.clone()
        if not with_frequencies:
            leaf.zero_()
        self.loss.loss = CumulativeMaskedScore(UniformSize(64), random_state=0)
        score = float(self.loss(fresh))
        self.loss.loss = training
        leaf.copy_(kept)
        return score / fresh.numel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
