"""One scale of attitude, or a few kinds of voter? Item response models and latent classes, cells missing.

944 people of the American National Election Study of 1996 (shipped with statsmodels), six of their answers made
binary by thresholds written below, every tenth answer hidden. 1-PL (all items discriminate equally), 2-PL (each in
its own way) and latent classes are ranked by the likelihood of people that were not fitted; hidden answers are then
imputed. Writes item_response.png. Skips where statsmodels is not installed.

    python examples/item_response.py [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
from scipy.special import expit, log_expit, logsumexp
from scipy.stats import norm
from torch import Tensor

from bayes_mpt import BayesMPT, compare
from bayes_mpt.models import LatentClass
from bayes_mpt.plots import RankingDisplay
from bayes_mpt.predictors import Quadrature


def one_pl(x: Tensor) -> None:
    respond(x, pyro.param("slope", lambda: x.new_ones(())))


def two_pl(x: Tensor) -> None:
    respond(x, pyro.param("slope", lambda: x.new_ones(x.shape[1])))


def respond(x: Tensor, slope: Tensor) -> None:
    """Answers given the place of each person on one scale, log odds = easiness + slope * ability."""
    easiness = pyro.param("easiness", lambda: x.mean(0).clamp(0.05, 0.95).logit())
    with pyro.plate("people", len(x)):
        ability = pyro.sample("ability", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=easiness + slope * ability[..., None]).to_event(1), obs=x)


def main(output: Path) -> None:
    survey = read_survey()
    if survey is None:
        print("skipped: statsmodels, which carries the survey, is not installed")
        return
    answers, party = survey
    hidden = np.random.default_rng(0).random(answers.shape) < 0.1
    X = answers.mask(hidden)

    train, test = X[::3].index.union(X[1::3].index), X[2::3].index  # two thirds of the people, and the others

    fits = {
        "1-PL": BayesMPT(one_pl, predictor=Quadrature(21)),
        "2-PL": BayesMPT(two_pl, predictor=Quadrature(21)),
        **{
            f"{k} class" + "es" * (k > 1): BayesMPT(LatentClass(k, n_levels=2), random_state=0)
            for k in (1, 2, 3, 4)
        },
    }
    for fit in fits.values():
        fit.fit(X.loc[train])
    table = compare(fits, X.loc[test])  # rows that none was fitted on: the held-out LML
    print(
        f"{len(train)} people fitted, {len(test)} held out, {X.shape[1]} answers, {hidden.mean():.0%} of them hidden"
    )
    with pd.option_context("display.width", 120, "display.float_format", "{:.2f}".format):
        print(table[["rank", "lml", "lml_diff", "dse", "diag"]].to_string())

    print("\nhidden answers guessed right:")
    unseen = hidden & answers.index.isin(test)[:, None]
    truth = answers.to_numpy()[unseen] == 1
    commoner = np.broadcast_to(X.loc[train].mean() > 0.5, X.shape)
    accuracy = {"the commoner answer": float((commoner[unseen] == truth).mean())}
    for name, fit in fits.items():
        accuracy[name] = float(((np.asarray(fit.impute(X))[unseen] > 0.5) == truth).mean())
    for name, share in accuracy.items():
        print(f"  {name:20} {share:.1%}")
    best = fits["2-PL"]
    score = best.transform(X)[:, 0] * np.sign(best.params_["slope"][0])
    print(f"\n{best.explain()}\n")
    correlation = np.corrcoef(score, party)[0, 1]
    print(f"correlation of the 2-PL scores with party identification, which no model saw: {correlation:.2f}")

    # Known otherwise: the likelihood on a fine grid of abilities, and independent answers for one class.
    for name in ("1-PL", "2-PL"):
        grid, estimate = by_grid(fits[name].params_, X.to_numpy()), fits[name].estimate(X, n_replicates=1)
        print(
            f"{name}: LML {estimate.total:.4f}, said to be within {estimate.se:.4f}; on the grid {grid:.4f}"
        )
        assert abs(estimate.total - grid) < max(estimate.se, 1e-6)
    p, n = X.loc[train].mean(), X.loc[train].notna().sum()
    independent = float((n * (p * np.log(p) + (1 - p) * np.log(1 - p))).sum())
    assert abs(fits["1 class"].log_marginal_likelihood_ - independent) < 1e-3
    assert best.log_marginal_likelihood_ > fits["1-PL"].log_marginal_likelihood_  # which it contains
    assert accuracy["2-PL"] > accuracy["the commoner answer"] + 0.05
    assert correlation > 0.7

    output.mkdir(parents=True, exist_ok=True)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    RankingDisplay(table).plot(left)
    left.set_title("Ranked by people that were not fitted")
    draw_items(middle, best, X.columns)
    right.boxplot([score[party == point] for point in range(7)], tick_labels=range(7), showfliers=False)
    right.set(
        xlabel="party: strong Democrat to strong Republican",
        ylabel="2-PL score",
        title="A check from outside",
    )
    figure.savefig(output / "item_response.png", dpi=120)
    print(f"wrote {output / 'item_response.png'}")


def read_survey() -> tuple[pd.DataFrame, pd.Series] | None:
    """Binary answers (N, T), and the seven points of party identification from strong Democrat."""
    try:
        from statsmodels.datasets import anes96
    except ImportError:
        return None
    data = anes96.load_pandas().data
    answers = {
        "would vote for Dole": data.vote == 1,
        "own views right of centre": data.selfLR > 4,
        "sees Clinton as left": data.ClinLR < 3,
        "sees Dole as very right": data.DoleLR > 5,
        "income over $45,000": data.income > 18,
        "college degree": data.educ > 5,
    }
    return pd.DataFrame(answers).astype(float), data.PID


def by_grid(params: dict[str, np.ndarray], rows: np.ndarray) -> float:
    """Log-likelihood of the observed answers, abilities integrated on 4001 points from -8 to 8."""
    z = np.linspace(-8, 8, 4001)
    log_odds = params["easiness"] + params["slope"] * z[:, None]  # (G, T)
    yes, no = np.nan_to_num(rows), np.nan_to_num(1 - rows)
    log_lik = log_expit(log_odds) @ yes.T + log_expit(-log_odds) @ no.T  # (G, N)
    return float((logsumexp(log_lik + norm.logpdf(z)[:, None], axis=0) + np.log(z[1] - z[0])).sum())


def draw_items(ax: plt.Axes, fit: BayesMPT, names: pd.Index) -> None:
    """Probability of yes against the place on the scale."""
    sign = np.sign(fit.params_["slope"][0])
    z = np.linspace(-2.5, 2.5, 300)
    for i, name in enumerate(names):
        ax.plot(z, expit(fit.params_["easiness"][i] + sign * fit.params_["slope"][i] * z), label=name)
    ax.set(
        xlabel="scale, conservative to the right",
        ylabel="probability of yes",
        title="Items of the 2-PL model",
    )
    ax.legend(fontsize="x-small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    main(parser.parse_args().output)
