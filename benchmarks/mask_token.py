"""Masked token optimisation, a reconstruction: epochs and CPU time to reach the score of the plain mask token.

Handwritten digits of scikit-learn in 16 tokens of 16 codes (2 x 2 pixels, black or white), `MaskedTransformer` of width
32. Each variant trains the same epochs from the same seed, and after each epoch the same held-out rows are scored under
the same masks. Three settings: two layers and 60 % of the tokens hidden; masks of every size, the package's default;
four layers and 60 % hidden. The learning rate suits the plain network in the first; in the other two it is too
large for it, as "half the rate" shows.

Speed-up: the lower of the two final scores (mean of the last five epochs) is the target, which both reach; the plain
network's epochs to it over the variant's, of curves made monotone. Above one, the variant is faster. In CPU time: that,
times the plain network's seconds an epoch over the variant's. Over seeds in pairs: geometric mean and 95 % interval of
Student's t of the logarithms. Published for the original: half the epochs, a speed-up of two. Ahead: by how much the
variant's score of fresh rows, all mask sizes, lies above at the end, in nats a row.

Controls: a mask vector that is frozen and long; one mask vector for each position (no consistency); the mean of the
embeddings (no singularity). They stand in the program's stead for its parameter "mask", by a handler. The probe: H^l by
layer of plain and optimised networks as they train.
"""

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from timing import Report, run

from bayes_mpt import BayesMPT
from bayes_mpt.masks import EverySize, FixedRate
from bayes_mpt.models import MaskedTransformer, OptimizedMask
from bayes_mpt.predictors import SelfPredictive

WIDTH, HIDDEN, N_FRESH, LAST = 32, 0.6, 300, 5
LONG = 10.0  # of the frozen vector, in units of a vector of D standard normals
NOTHING = {"recalibrate": False, "spatial": 0.0, "singular": 0.0, "falling": 0.0}
TERMS = {
    "recalibration alone": OptimizedMask(**{**NOTHING, "recalibrate": True}),
    "spatial alone": OptimizedMask(**{**NOTHING, "spatial": 0.1}),
    "singular alone": OptimizedMask(**{**NOTHING, "singular": 0.1}),
    "falling alone": OptimizedMask(**{**NOTHING, "falling": 0.1}),
}
CONTROLS = ("frozen and long", "one for each position", "mean of the embeddings")
MAIN = {"plain": "learned", "optimized": OptimizedMask(), **TERMS, **dict.fromkeys(CONTROLS, "learned")}
HALF = ", half the rate"
RATES = {"plain": "learned", "optimized": OptimizedMask(), "plain" + HALF: "learned"}
SIZES = {**RATES, "singular alone": TERMS["singular alone"], "optimized" + HALF: OptimizedMask()}
SETTINGS = {
    "60 % hidden, 2 layers": {
        "layers": 2,
        "masks": FixedRate(HIDDEN),
        "rate": 3e-3,
        "epochs": 24,
        "kinds": MAIN,
    },
    "all sizes, 2 layers": {"layers": 2, "masks": None, "rate": 5e-3, "epochs": 36, "kinds": SIZES},
    "60 % hidden, 4 layers": {
        "layers": 4,
        "masks": FixedRate(HIDDEN),
        "rate": 3e-3,
        "epochs": 20,
        "kinds": RATES,
    },
}
LOOKS = (1, 4, 12)  # epochs after which the probe looks, beside the last
STEPS: list[float] = []  # CPU clock at each training step


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


class Watched(MaskedTransformer):
    """The transformer, its steps timed, perhaps with another mask vector."""

    def __init__(self, width, n_layers, n_heads, *, control=None, **settings):
        super().__init__(width, n_layers, n_heads, **settings)
        self.control = control

    def __call__(self, x, visible):
        if torch.is_grad_enabled() and not bool(visible.all()):
            STEPS.append(time.process_time())
        if self.control is None:
            return super().__call__(x, visible)
        with Instead(self.control):
            return super().__call__(x, visible)


def tokens():
    """(N, 16) codes of 2 x 2 pixels."""
    black = load_digits().images > 7
    blocks = black.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    return (blocks @ [1, 2, 4, 8]).astype(np.float32)


def train(name, kind, setting, looks, X, fresh, seed):
    """History, seconds of CPU time an epoch, score of fresh rows a row, and H^l after some epochs."""
    program = Watched(
        WIDTH,
        setting["layers"],
        4,
        n_levels=16,
        mask_token=kind,
        control=name if name in CONTROLS else None,
    )
    shown = np.random.default_rng(1).random(fresh.shape) > HIDDEN
    seconds, probe = 0.0, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for epochs in looks:  # goes on from the file, to the bit
            STEPS.clear()
            mpt = BayesMPT(
                program,
                masks=setting["masks"],
                predictor=SelfPredictive(1),
                max_iter=epochs,
                n_iter_no_change=10**6,
                validation_fraction=0.2,
                batch_size=64,
                learning_rate=setting["rate"] / (2 if name.endswith(HALF) else 1),
                checkpoint=Path(folder) / "training.pt",
                random_state=seed,
            ).fit(X)
            seconds += STEPS[-1] - STEPS[0]
            if name not in CONTROLS:
                probe[epochs] = program.heterogeneity(mpt.params_, fresh, shown).tolist()
    found = mpt.estimate(fresh, masks=EverySize(1), n_replicates=2)
    return np.array(mpt.history_), seconds / epochs, found.total / len(fresh), probe


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
    X = tokens()
    settings = {name: s | {"epochs": 6, "kinds": RATES} if args.quick else s for name, s in SETTINGS.items()}
    runs: dict[tuple[str, str], list] = {(n, kind): [] for n, s in settings.items() for kind in s["kinds"]}
    for seed in range(2 if args.quick else args.seeds):
        elapsed = (time.perf_counter() - begun) / 60
        if seed > 1 and elapsed * (seed + 1) / seed > args.minutes:
            report.note(f"{seed} of {args.seeds} seeds in {args.minutes} minutes")
            break
        order = np.random.default_rng(seed).permutation(len(X))
        fresh, rest = X[order[:N_FRESH]], X[order[N_FRESH:]]
        for name, kind in list(runs)[:: 1 if seed % 2 == 0 else -1]:
            setting = settings[name]
            last, mask = setting["epochs"], setting["kinds"][kind]
            probed = name == next(iter(settings)) and kind in ("plain", "optimized") and not args.quick
            looks = (*LOOKS, last) if probed else (last,)
            history, seconds, score, probe = train(kind, mask, setting, looks, rest, fresh, seed)
            runs[name, kind].append((history, seconds, score))
            report.row(
                setting=name,
                kind=kind,
                seed=seed,
                final=float(history[-LAST:].mean()),
                fresh=score,
                cpu_seconds=seconds * last,
                heterogeneity=probe,
                history=history.tolist(),
            )
    for (name, kind), found in runs.items():
        if kind == "plain":
            plain = found
            continue
        ratios = [speed_up(a[0], b[0]) for a, b in zip(plain, found, strict=True)]
        mean, low, high = np.exp(interval(np.log(ratios)))
        dearer = float(np.median([b[1] for b in found]) / np.median([a[1] for a in plain]))
        ahead = interval([b[2] - a[2] for a, b in zip(plain, found, strict=True)])
        report.row(
            setting=name,
            variant=kind,
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
