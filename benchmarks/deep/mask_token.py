"""Masked token optimisation, a reconstruction: epochs and CPU time to reach the score of the plain mask token.

The program is the one of `examples/optimized_mask.py`, a `MaskedTransformer` with penalties, here of width 32, on
handwritten digits of scikit-learn in 16 tokens of 16 codes (2 x 2 pixels, black or white). Each variant trains the same
epochs from the same seed, and after each epoch the same held-out rows are scored under the same masks. Three settings:
two layers and 60 % of the tokens hidden; masks of every size, the package's default; four layers and 60 % hidden. With
masks of every size the learning rate is too large for the plain network, as half the rate shows, at which the optimised
one is compared with the plain one at half the rate too.

Speed-up: the lower of the two final scores (mean of the last five epochs) is the target, which both reach; the plain
network's epochs to it over the variant's, of curves made monotone. Above one, the variant is faster. In CPU time: that,
times the plain network's seconds an epoch over the variant's. Over seeds in pairs: geometric mean and 95 % interval of
Student's t of the logarithms. Published for the original: half the epochs, a speed-up of two. Ahead: by how much the
variant's score of fresh rows, all mask sizes, lies above at the end, in nats a row.

Controls: a mask vector that is frozen and long; one mask vector for each position (no consistency); the mean of the
embeddings (no singularity). They stand in the program's stead for its parameter "mask", by a handler. The probe: H^l by
layer of plain and optimised networks as they train.

Asked: half the epochs to the plain network's held-out score, over five seeds; what each term alone gives.

Found, with other jobs on the two cores: it falls short. At a rate that suits the plain network the speed-up is 1.04 (95
% interval 0.93 to 1.16), in CPU time 0.64; with masks of all sizes 1.13 (0.96 to 1.33), with four layers 0.90 (0.58 to
1.41). With masks of all sizes at twice that rate it is 1.77 (0.92 to 3.39), where halving the rate of the plain network
brings 2.23. No term alone is ahead; a frozen, long mask vector is four times slower. An earlier run, in which the rate
did not rise over the first steps, had 2.03 (1.08 to 3.82) with four layers.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from scipy.stats import t as student
from sklearn.datasets import load_digits

from bayes_mpt.masks import EverySize, FixedRate
from bayes_mpt.predictors import Batch, SelfPredictive
from bayes_mpt.score import OWN_MASKS
from bayes_mpt.training import Problem
from bayes_mpt.training.epochs import train_by_epochs

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from optimized_mask import NOTHING, OptimizedMaskTransformer

WIDTH, HIDDEN, N_FRESH, N_HELD_OUT, LAST = 32, 0.6, 300, 300, 5
LONG = 10.0  # of the frozen vector, in units of a vector of D standard normals
TERMS = {
    "recalibration alone": {**NOTHING, "recalibrate": True},
    "spatial alone": {**NOTHING, "spatial": 0.1},
    "singular alone": {**NOTHING, "singular": 0.1},
    "falling alone": {**NOTHING, "falling": 0.1},
}
CONTROLS = ("frozen and long", "one for each position", "mean of the embeddings")
HALF = ", half the rate"
FEW = {"plain": NOTHING, "optimized": {}, "plain" + HALF: NOTHING}
MAIN = {**FEW, **TERMS, **dict.fromkeys(CONTROLS, NOTHING)}
RATES = {**FEW, "optimized" + HALF: {}}
SIZES = {**RATES, "singular alone": TERMS["singular alone"]}
SETTINGS = {
    "60 % hidden, 2 layers": {
        "layers": 2,
        "masks": FixedRate(HIDDEN),
        "rate": 2e-3,
        "epochs": 24,
        "kinds": MAIN,
    },
    "all sizes, 2 layers": {"layers": 2, "masks": OWN_MASKS, "rate": 5e-3, "epochs": 36, "kinds": SIZES},
    "60 % hidden, 4 layers": {
        "layers": 4,
        "masks": FixedRate(HIDDEN),
        "rate": 3e-3,
        "epochs": 20,
        "kinds": RATES,
    },
}
PROBED_EPOCHS = (1, 5, 10)  # epochs after which the probe looks, beside the last


class Instead(Messenger):
    """Another mask vector in the place of the learnt one."""

    def __init__(self, control: str):
        super().__init__()
        self.control = control

    def _pyro_param(self, msg):
        if msg["name"] != "mask":
            return
        if self.control == "one for each position":
            first = msg["args"][1]
            msg["args"] = ("mask", lambda: torch.stack([first() for _ in range(16)]))
            return
        if self.control == "frozen and long":
            msg["value"] = LONG * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
        else:
            msg["value"] = pyro.param("embedding").mean((0, 1))
        msg["done"] = msg["stop"] = True  # no parameter of its own


class Controlled(OptimizedMaskTransformer):
    """The transformer with another mask vector."""

    control = ""

    def __call__(self, x, visible):
        with Instead(self.control):
            super().__call__(x, visible)


def tokens():
    """(N, 16) codes of 2 x 2 pixels."""
    black = load_digits().images > 7
    blocks = black.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    return (blocks @ [1, 2, 4, 8]).astype(np.float32)


def train(name, kind, setting, rows, seed):
    """Score of held-out rows after each epoch, median seconds of CPU time an epoch, score of fresh rows, H^l."""
    fresh, held_out, train = (torch.as_tensor(r) for r in np.split(rows, [N_FRESH, N_FRESH + N_HELD_OUT]))
    program = (Controlled if name in CONTROLS else OptimizedMaskTransformer)(
        WIDTH, setting["layers"], 4, n_levels=16, **kind
    )
    program.control = name
    shown = torch.rand(fresh.shape, generator=torch.Generator().manual_seed(1)) > HIDDEN
    clock, probe = [], {}

    def look(epoch, _):
        clock.append(time.process_time())
        if name in ("plain", "optimized") and (epoch in PROBED_EPOCHS or epoch == setting["epochs"]):
            params = {n: p.detach().numpy() for n, p in pyro.get_param_store().named_parameters()}
            probe[epoch] = program.heterogeneity(params, fresh, shown).tolist()

    with pyro.get_param_store().scope():
        torch.manual_seed(seed)
        predictor = SelfPredictive(1).bind(program, (train,))
        whole = Batch((train,), len(train))
        (objective,) = predictor.schedule(whole, setting["masks"])
        clock.append(time.process_time())
        fit = train_by_epochs(
            [Problem(objective)],
            whole,
            Batch((held_out,), len(held_out)),
            batch_size=64,
            max_epochs=setting["epochs"],
            learning_rate=setting["rate"] / (2 if name.endswith(HALF) else 1),
            patience=setting["epochs"],
            random_state=seed,
            report=look,
        )
        with torch.no_grad():
            read = predictor.read((fresh,))
            score = float(read.score(EverySize(2).draw(16, 0)).mean())
    seconds = float(np.median(np.diff(clock)))  # of an epoch and its look at the held-out rows
    return np.array(fit.history), seconds, score, probe


def epochs_to(history, target):
    """Where the curve, made monotone, first reaches the target, between epochs too."""
    best = np.maximum.accumulate(history)
    at = int(np.argmax(best >= target))
    if at == 0:
        return 1.0
    return at + float((target - best[at - 1]) / (best[at] - best[at - 1]))


def speed_up(plain, other):
    target = min(plain[-LAST:].mean(), other[-LAST:].mean())
    return epochs_to(plain, target) / epochs_to(other, target)


def interval(values):
    """Mean and 95 % interval of Student's t."""
    values = np.asarray(values)
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def main(report: Report, args):
    begun = time.perf_counter()
    settings = {name: s | {"epochs": 6, "kinds": FEW} if args.quick else s for name, s in SETTINGS.items()}
    runs: dict[tuple[str, str], list] = {(n, kind): [] for n, s in settings.items() for kind in s["kinds"]}
    for seed in range(2 if args.quick else args.seeds):
        elapsed = (time.perf_counter() - begun) / 60
        if seed > 1 and elapsed * (seed + 1) / seed > args.minutes:
            report.note(f"{seed} of {args.seeds} seeds in {args.minutes} minutes")
            break
        rows = np.random.default_rng(seed).permutation(tokens())
        for name, kind in list(runs)[:: 1 if seed % 2 == 0 else -1]:
            setting = settings[name]
            history, seconds, score, probe = train(kind, setting["kinds"][kind], setting, rows, seed)
            runs[name, kind].append((history, seconds, score))
            report.row(
                setting=name,
                kind=kind,
                seed=seed,
                final=float(history[-LAST:].mean()),
                fresh=score,
                cpu_seconds=seconds * len(history),
                heterogeneity=probe,
                history=history.tolist(),
            )
    for (name, kind), found in runs.items():
        if kind == "plain":
            continue
        against = "plain" + HALF if kind == "optimized" + HALF else "plain"
        plain = runs[name, against]
        ratios = [speed_up(a[0], b[0]) for a, b in zip(plain, found, strict=True)]
        mean, low, high = np.exp(interval(np.log(ratios)))
        dearer = float(np.median([b[1] for b in found]) / np.median([a[1] for a in plain]))
        ahead = interval([b[2] - a[2] for a, b in zip(plain, found, strict=True)])
        report.row(
            setting=name,
            variant=kind,
            against=against,
            speed_up=mean,
            low=low,
            high=high,
            cost=dearer,
            speed_up_cpu=mean / dearer,
            ahead=ahead[0],
            ahead_low=ahead[1],
            ahead_high=ahead[2],
            ratios=ratios,
        )
        if kind == "optimized":
            report.target(
                f"{name}: half the epochs (speed-up 2)",
                None if args.quick else low >= 2,
                f"speed-up {mean:.2f} ({low:.2f} to {high:.2f}), in CPU time {mean / dearer:.2f}",
            )


def arguments(parser):
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="no seed begins that would end later")


if __name__ == "__main__":
    run(main, __file__, __doc__, arguments)
