"""Table 1 of arXiv 2306.00520: the masked score of PPCA with 1, 10 and 100 masks of every size against the exact LML.

N = 1000 rows of D = 200 tokens, K = 5 latents. The paper does not state this setting; it is that of its figure 4, and
the numbers agree to all printed digits. Masks are the published ones: the first m of a fresh random order, five
seeds.
The table is computed on the data as published (one noise value a row), and on data with the noise that the model has.
Writes table_1.png and table_1.json.

    python examples/paper/table_1.py [--output DIR]
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from setting import SEEDS, factors, few_rows, generated, lml, output_directory, report

from bayes_mpt import BayesMPT
from bayes_mpt.masks import Masks, PermutationChain
from bayes_mpt.score import estimate

N, D, K, SEED = 1000, 200, 5, 1991
PUBLISHED = {"exact": -60.34, 1: (-60.44, 0.47), 10: (-60.22, 0.12), 100: (-60.34, 0.03)}


def published_masks(n_each: int, seed: int) -> Masks:
    """For every size m = 1 .. D, n_each times: the first m tokens of a fresh random order are hidden."""
    g = torch.Generator().manual_seed(seed)
    size = torch.arange(1, D + 1).repeat_interleave(n_each)
    hidden = torch.zeros(len(size), D, dtype=torch.bool)
    for row, m in zip(hidden, size.tolist(), strict=True):
        row[torch.randperm(D, generator=g)[:m]] = True
    return Masks(~hidden, None, hidden / (size[:, None] * n_each).double())


def main() -> None:
    masks = {n: [published_masks(n, seed) for seed in SEEDS] for n in (1, 10, 100)}
    found = {}
    for shared in (True, False):
        loading, x = generated(N, D, K, SEED, shared=shared)
        model = BayesMPT(lambda x, w=loading: factors(x, torch.from_numpy(w))).fit(x)
        few = few_rows(x)
        exact = model.score(x)
        # independent noise has full rank, hence D rows in the place of 6: of the largest draws one seed is enough
        scores = {
            n: [
                float(model.predictor_.read((few,)).score(m).mean())
                for m in (draws if shared or n < 100 else draws[:1])
            ]
            for n, draws in masks.items()
        }
        found["as its code computes" if shared else "corrected noise"] = {"exact": exact, **scores}

        # Known otherwise: dense algebra; few rows and the rows themselves; a chain needs one order and has no noise.
        assert abs(exact - lml(loading, x)) < 1e-8
        whole = model.predictor_.read((torch.from_numpy(x),)).score(masks[1][0]).mean()
        assert abs(whole - scores[1][0]) < 1e-6
        chain = estimate(model.predictor_.read((few,)), PermutationChain(), n_replicates=1, random_state=0)
        assert abs(chain.lml.mean() - exact) < 1e-6
    for n in masks:
        mean, sd = PUBLISHED[n]
        scores = found["as its code computes"][n]
        assert abs(np.mean(scores) - mean) < 0.006
        assert np.std(scores) - 0.006 <= sd <= np.std(scores, ddof=1) + 0.006  # which of the two is not said

    rows = [["exact LML", f"{PUBLISHED['exact']:.2f}", *(f"{f['exact']:.3f}" for f in found.values())]]
    for n in masks:
        cells = [
            f"{np.mean(f[n]):.3f}" + (f" ± {np.std(f[n], ddof=1):.3f}" if len(f[n]) > 1 else ", one seed")
            for f in found.values()
        ]
        rows.append([f"{n} × {D} masks", "{:.2f} ± {:.2f}".format(*PUBLISHED[n]), *cells])
    rows.append(["one chain", "", *(f"{f['exact']:.3f} ± 0" for f in found.values())])
    report(
        output_directory(__doc__),
        "table_1",
        draw(found),
        source="arXiv 2306.00520, Table 1: mean and standard deviation over five seeds of the masks, nats a row",
        differences=[
            "double precision where the published code has single",
            "in the last column the rows' noise is independent, of variance 0.2 a cell; one seed of 100 masks",
        ],
        columns=["nats a row", "published", *found],
        rows=rows,
        numbers=found,
    )


def draw(found: dict) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True, sharey=True)
    for ax, (name, f), color in zip(axes, found.items(), ("C3", "C0"), strict=True):
        for place, n in enumerate((1, 10, 100)):
            off = np.array(f[n]) - f["exact"]
            ax.plot(place + np.linspace(-0.12, 0.12, len(off)), off, "o", ms=5, color=color, alpha=0.6)
            if len(off) > 1:
                ax.errorbar(place + 0.25, off.mean(), off.std(ddof=1), fmt="_", color="0.3", capsize=3)
        ax.axhline(0, color="0.5", lw=0.8, ls=":")
        ax.set_xticks(range(3), ["1", "10", "100"])
        ax.set(xlabel="masks of every size", title=f"{name}: exact LML {f['exact']:.2f}")
    axes[0].plot(
        np.arange(3) + 0.25,
        [PUBLISHED[n][0] + 60.344 for n in (1, 10, 100)],
        "kx",
        ms=6,
        label="published mean",
    )
    axes[0].legend()
    axes[0].set_ylabel("masked score minus exact LML, nats a row")
    return figure


if __name__ == "__main__":
    main()
