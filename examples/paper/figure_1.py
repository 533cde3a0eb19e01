"""Figure 1 of arXiv 2306.00520: the masked score of PPCA against the exact LML, by the number of masks of every size.

Left and centre: D = 5 and 50 tokens, N = 100 rows, K = 2, five seeds with data of their own. Right: D = 512, only size
m = 76 (15 %), whose difference does not go to zero: it is the bias B = LML - T S(m), read off the masked curve.
Writes figure_1.png and figure_1.json.

    python examples/paper/figure_1.py [--output DIR]
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from setting import SEEDS, factors, few_rows, generated, lml, output_directory, report

from bayes_mpt import BayesMPT
from bayes_mpt.masks import EverySize, FixedRate
from bayes_mpt.score import Curve, estimate, fixed_rate_bias

N, K, M = 100, 2, 76
MASKS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 140, 199]
MASKS_512 = [1, 2, 3, 5, 8]


def fitted(d: int, seed: int, *, shared: bool) -> tuple[BayesMPT, torch.Tensor, float]:
    """The program at the true loadings, rows that stand for all, the exact LML."""
    loading, x = generated(N, d, K, seed, shared=shared)
    model = BayesMPT(lambda x: factors(x, torch.from_numpy(loading))).fit(x)
    exact = lml(loading, x)
    assert abs(model.score(x) - exact) < 1e-8
    return model, few_rows(x), exact


def main() -> None:
    found = {(d, shared): convergence(d, shared=shared) for d in (5, 50) for shared in (True, False)}
    fixed = {shared: fixed_size(shared=shared) for shared in (True, False)}

    rows = []
    for d in (5, 50):
        for i, n in ((0, 1), (7, 10), (18, 199)):
            cells = [f"{np.sqrt(np.mean(found[d, s]['difference'][:, i] ** 2)):.3f}" for s in (True, False)]
            rows.append(
                [f"D = {d}: difference (rms of 5 seeds), {n} × every size", "to 0, a picture", *cells]
            )
    for name, key, form in [
        ("D = 512: exact LML", "exact", "{:.2f}"),
        ("D = 512: bias of m = 76", "bias", "{:.2f}"),
        ("D = 512: of it, sizes beyond 76", "tail", "{:.2f}"),
        ("D = 512: of it, dependence within the mask", "within", "{:.2f}"),
    ]:
        error = " ± {:.2f}" if key == "bias" else ""
        cells = [form.format(fixed[s][key]) + error.format(fixed[s]["se"]) for s in (True, False)]
        rows.append([name, "not 0, a picture" if key == "bias" else "", *cells])
    numbers = {
        f"D = {d}, {'shared' if s else 'own'} noise": {
            "masks": MASKS,
            "difference": f["difference"].tolist(),
            "sd": f["sd"],
        }
        for (d, s), f in found.items()
    }
    for s, f in fixed.items():
        numbers[f"D = 512, {'shared' if s else 'own'} noise"] = {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in f.items() if k != "curve"
        }
    report(
        output_directory(__doc__),
        "figure_1",
        draw(found, fixed[True]),
        source="arXiv 2306.00520, Figure 1 (a picture)",
        differences=[
            f"the number of masks takes {len(MASKS)} values from 1 to 199; the published code takes 0 (0/0) to 199; "
            f"at D = 512 it is one of {MASKS_512}",
            "masks of our own draws, fresh at every point as in the code",
            "the last column: the same loadings and latents, but independent noise of variance 0.2 a cell",
        ],
        columns=["nats a row", "published", "as its code computes", "corrected noise"],
        rows=rows,
        numbers=numbers,
    )


def convergence(d: int, *, shared: bool) -> dict:
    """Differences LML - score (seeds, masks), the standard deviation of one mask of every size by seed."""
    difference, sd = [], []
    for seed in SEEDS:
        model, few, exact = fitted(d, seed, shared=shared)
        g = torch.Generator().manual_seed(seed)
        points = [model.predictor_.read((few,)).score(EverySize(n).draw(d, g)).mean() for n in MASKS]
        difference.append([exact - float(p) for p in points])
        e = estimate(model.predictor_.read((few,)), EverySize(1), n_replicates=300, random_state=0)
        sd.append(float(e.diagnostics["totals"].std(ddof=1)) / len(few))
    difference = np.array(difference)
    # Known otherwise: unbiased, with a standard deviation that falls as the root of the number of masks.
    z = difference * np.sqrt(MASKS) / np.array(sd)[:, None]
    assert abs(z).max() < 5 and abs(z.mean()) < 4 / np.sqrt(z.size) and 0.7 < z.std() < 1.3
    return {"difference": difference, "sd": sd}


def fixed_size(*, shared: bool) -> dict:
    """Differences LML - T S(76) (seeds, masks), and the bias with its two parts from the whole curve."""
    d = 512
    model, few, exact = fitted(d, 111, shared=shared)
    difference = np.zeros((0, 0))
    if shared:  # the published code sums T draws of n masks each: T n masks of one size
        difference = np.array(
            [
                [
                    exact
                    - float(model.predictor_.read((few,)).score(FixedRate(M / d, d * n).draw(d, seed)).mean())
                    for n in MASKS_512
                ]
                for seed in SEEDS
            ]
        )
    bias = fixed_rate_bias(model, few, M / d, n_masks=4000 if shared else 1500, random_state=0)
    curve = estimate(
        model.predictor_.read((few,)), EverySize(16 if shared else 1), n_replicates=1, random_state=0
    ).by_size
    # Sum over m > M of S(m) = E log p(x_R), |R| = T - M: so B = LML - T S(M) splits into that tail and the mask itself.
    visible = FixedRate(M / d, 100).draw(d, 1).visible
    seen = np.mean([float(model.predictor_.read((few.where(v, torch.nan),)).score().mean()) for v in visible])
    tail = seen - (d - M) * (exact - bias.value) / d
    assert abs(curve.mean[M:].sum() - seen) < (0.3 if shared else 3)
    if shared:  # Known otherwise: the mean of the differences estimates the same number
        error = np.hypot(difference.std(ddof=1) / np.sqrt(difference.size), bias.se)
        assert abs(difference.mean() - bias.value) < 4 * error
        assert abs(curve.mean.sum() - exact) < 5 * np.sqrt(np.nansum(curve.se**2))
    return {
        "exact": exact,
        "bias": bias.value,
        "se": bias.se,
        "tail": float(tail),
        "within": float(bias.value - tail),
        "difference": difference,
        "curve": curve,
    }


def draw(found: dict, fixed: dict) -> plt.Figure:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, d in zip(axes[0], (5, 50), strict=True):
        f = found[d, True]
        band = 2 * np.mean(f["sd"]) / np.sqrt(MASKS)
        ax.fill_between(
            MASKS, -band, band, color="C3", alpha=0.12, lw=0, label="± 2 sd of one mask a size / √n"
        )
        ax.plot(MASKS, f["difference"].T, color="C3", lw=1.2, alpha=0.7)
        ax.axhline(0, color="k", lw=1, ls="--")
        ax.set(
            xscale="log",
            xlabel="masks of every size",
            ylabel="LML − masked score",
            title=f"every size, D = {d}",
            ylim=(-1.4, 1.4),
        )
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.legend(loc="lower right")
    left, right = axes[1]
    left.plot(MASKS_512, fixed["difference"].T, color="C0", lw=1.2, alpha=0.7)
    left.axhline(fixed["bias"], color="C0", ls="--", lw=1, label=f"B = LML − T S(76) = {fixed['bias']:.2f}")
    left.axhline(0, color="k", lw=1, ls="--")
    left.set(
        xlabel="512 × masks of size 76",
        ylabel="LML − scaled score",
        title="15 % hidden, D = 512",
        ylim=(-8, 0.5),
    )
    left.legend(loc="center right")
    curve: Curve = fixed["curve"]
    at = (fixed["exact"] - fixed["bias"]) / 512
    right.plot(curve.size / 512, curve.mean, color="C0", label="S(m); the area under it is the LML")
    right.plot([0, 1], [at, at], color="C1", lw=1, label="S(76) at every size")
    right.fill_between(curve.size / 512, curve.mean, at, color="C1", alpha=0.3, lw=0, label="between them: B")
    right.axvline(M / 512, color="0.5", lw=0.8, ls=":")
    right.set(
        xlabel="share of hidden tokens", ylabel="nats a token", title="what one size leaves out", xlim=(0, 1)
    )
    right.xaxis.set_major_formatter("{x:.0%}")
    right.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    main()
