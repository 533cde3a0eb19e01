"""Which rule chooses the better factor model, kind and dimension, and do its weights keep their word?

    python benchmarks/ranking/choice_study.py             # 500, 200 and 200 tables, those that are stored not again
    python benchmarks/ranking/choice_study.py --report    # of those that are stored
    python benchmarks/ranking/choice_study.py --quick     # some tables of another seed

Tables, each kind of model equally often the true one, true K 0 .. min(4, D/2), signal log-uniform on 0.2-1.5, noise
variances of factor analysis of ratio 2 to 50:

- gaussian: D 5-12, N 60-300; holes: D 5-8, N 60-120, 15 % of the cells missing at random;
- off the model, D 5-10, N 60-300, from the same laws: t_5 and t_10 rows, 3 % gross outliers (five times the sd), scores
  cut at four points, columns skewed by an exponential;
- six real tables of scikit-learn and statsmodels, columns standardised, a quarter of the rows held out once.

Every rule chooses among PPCA and factor analysis with K = 0 .. D/2 each:

- auto: `MarginalLikelihoodSearch` as a user calls it; its table also gives "expected" (the greatest expected score,
  unchecked) and "evidence" (the greatest integrated LML);
- laplace, AIC, BIC; Minka's rule as scikit-learn computes it, of PPCA with K at least 1 only;
- 5 folds, 5 x 5 folds: held-out log likelihood, fits made on covariances; with holes 5 folds of the estimator's own.

Regret: what the pick's maximum-likelihood fit loses against that of the best candidate in expected log density of N new
complete rows (fits are Gaussian: mean and covariance of the law tell it; for scores and skewed columns these are of
200 000 fresh rows, for real tables of the rows held out). Differences are paired by table, with normal 95 % intervals.

Asked: the upper 95 % bound of auto's regret minus that of each other rule below 0.3 nats, off the model below 1, and
below 0 against AIC and BIC; above a weight of 0.95 within the true kind the interval of the hit rate reaches 95 %.

Found on all 906 tables (500 Gaussian, 200 with holes, 200 off the model, six real), sizes and seed fixed before, looked
at after 841, 881 and 906; auto minus the rule, nats, with 95 % intervals:

- gaussian: **met** against all: Laplace (+0.06, to 0.19), 5 x 5 folds (-0.13, to 0.12), 5 folds (-0.54, to -0.22),
  Minka, AIC (-0.90, to -0.52) and BIC (-1.19, to -0.72). True K and kind: auto 64 %, Laplace 65, 5 x 5 folds 63, AIC
  61, 5 folds 60, BIC 55;
- holes: **met** against all: Laplace (-0.31, to 0.04), 5 folds (-0.39, to 0.22), AIC (-1.10, to -0.36), BIC (-1.41, to
  -0.62);
- off the model: **met** against all: 5 folds (-0.24, to 0.24), 5 x 5 folds (-0.29, to 0.45), Laplace (-16.2, to -9.7),
  Minka, AIC (-18.3, to -11.8) and BIC (-13.3, to -7.2), by outliers mostly. The check sends 54 % of the tables to
  hidden rows;
- real: equal to Laplace, ahead of the other rules in the mean, and six tables decide no more than that (**undecided**);
- weights above 0.95 on Gaussian tables: **met**, right in 96 % of 95 (90 to 99), log score -0.81, Brier 0.089;
  Laplace's in 85 % of 224 (79 to 89), -1.13, 0.101. Off the model they are not to be believed: 60 % of 43 (44 to 75).

The last 65 of them, the last lines of each group, were found by fits that look for the highest of several maxima of
complete rows, and by annealing that starts surplus columns as pilots fit them; the 841 before by one climb.

What was found of each table stands in the JSON file, ``units``, a line each; JSON lines beside it hold those of a run
that is going on or was stopped. A run goes on from both, groups in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest
from selection_study import KINDS, held_out, interval, laplace, maximise, n_parameters
from sklearn import datasets
from sklearn.decomposition._pca import _assess_dimension
from sklearn.model_selection import KFold, train_test_split
from threadpoolctl import threadpool_limits

from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, FactorAnalysis
from bayes_mpt.warnings import MisfitWarning

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import store, stored

RESULTS = Path(__file__).with_suffix(".json")
SEED, QUICK_SEED = 3141, 1
SIZES = {"tables": 500, "holes": 200, "off": 200}
QUICK = {"tables": 4, "holes": 1, "off": 5}
MODELS = {"ppca": PPCA, "fa": FactorAnalysis}
OFF = ("t_5", "t_10", "outliers", "scores", "skewed")
REAL = ("iris", "wine", "breast_cancer", "diabetes", "digits", "star98")
RULES = ("auto", "expected", "evidence", "laplace", "minka", "AIC", "BIC", "5 folds", "5 x 5 folds")
OURS = ("auto", "expected", "evidence")
LIMITS = {"gaussian": 0.3, "holes": 0.3, "off": 1.0, "real": 1.0}
SURE = 0.95
N_FRESH = 200_000
N_CHECKED = 3  # tables of each group compared with the search's own estimator


class Table(NamedTuple):
    group: str
    kind: str
    """Of the true model; empty where there is none."""
    k: int
    x: np.ndarray
    """(N, D)"""
    mean: np.ndarray
    """(D,) of new rows."""
    cov: np.ndarray
    """(D, D) of new rows."""
    n_new: int
    """That a fit is judged by."""


# ------------------------------------------------------------------------------------------------------------ tables


def rows_of_law(law: str, n: int, w: np.ndarray, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """N rows (N, D) made from Gaussian ones of covariance W W' + noise."""
    d, k = w.shape
    x = rng.normal(size=(n, k)) @ w.T + rng.normal(size=(n, d)) * np.sqrt(noise)
    sd = np.sqrt((w**2).sum(1) + noise)
    if law.startswith("t_"):
        degrees = int(law[2:])
        return x * np.sqrt((degrees - 2) / rng.chisquare(degrees, n))[:, None]
    if law == "outliers":
        gross = rng.random(n) < 0.03
        return np.where(gross[:, None], 5 * sd * rng.normal(size=(n, d)), x)
    if law == "scores":
        return 1.0 + sum((x > cut * sd).astype(float) for cut in (-1.2, -0.4, 0.4, 1.2))
    if law == "skewed":
        return sd * np.exp(0.5 * x / sd)
    return x


def draw(group: str, seed: int, index: int) -> Table:
    """A table of a known law."""
    rng = np.random.default_rng([seed, ("gaussian", "holes", *OFF).index(group), index])
    largest_d, largest_n = (8, 120) if group == "holes" else (12 if group == "gaussian" else 10, 300)
    kind, d = KINDS[index % 2], int(rng.integers(5, largest_d + 1))
    n = round(math.exp(rng.uniform(math.log(60), math.log(largest_n))))
    k = int(rng.integers(0, min(4, d // 2) + 1))
    signal = math.exp(rng.uniform(math.log(0.2), math.log(1.5)))
    w = signal * rng.uniform(0.5, 1.5, k) * rng.normal(size=(d, k))
    noise = np.ones(d)
    if kind == "fa":
        half = rng.uniform(math.log(2), math.log(50)) / 2
        noise = np.exp(rng.uniform(-half, half, d))
    x = rows_of_law(group, n, w, noise, rng)
    cov, mean = w @ w.T + np.diag(noise), np.zeros(d)
    if group == "outliers":
        cov = 0.97 * cov + 0.03 * 25 * np.diag(np.diag(cov))
    if group in ("scores", "skewed"):
        fresh = rows_of_law(group, N_FRESH, w, noise, rng)
        mean, cov = fresh.mean(0), np.cov(fresh.T)
    if group == "holes":
        x[rng.random(x.shape) < 0.15] = np.nan
        x = x[~np.isnan(x).all(1)]
    return Table(group, kind, k, x, mean, cov, len(x))


def real(name: str) -> Table:
    """A real table, judged by a quarter of its rows."""
    if name == "star98":
        import statsmodels.api as sm

        raw = sm.datasets.star98.load_pandas().data.to_numpy(float)[:, 2:13]
    else:
        raw = getattr(datasets, f"load_{name}")().data
        if name == "breast_cancer":
            raw = np.log(raw[:, [0, 1, 4, 5, 8, 9, 10, 11, 14, 18, 24]])
        if name == "digits":
            raw = raw[:400, [18, 19, 20, 21, 26, 27, 28, 34, 35, 36, 42, 43]]
    train, test = train_test_split(raw, test_size=0.25, random_state=0)
    mean, sd = train.mean(0), train.std(0)
    new = (test - mean) / sd
    return Table("real", "", -1, (train - mean) / sd, new.mean(0), np.cov(new.T, bias=True), len(new))


# ------------------------------------------------------------------------------------------------------- rules


def candidates(table: Table) -> list[tuple[str, int]]:
    return [(kind, k) for kind in KINDS for k in range(table.x.shape[1] // 2 + 1)]


def worth(table: Table, mean: np.ndarray, cov: np.ndarray) -> float:
    """Expected log density of the new rows under N(mean, cov)."""
    off = table.mean - mean
    quadratic = np.trace(np.linalg.solve(cov, table.cov + np.outer(off, off)))
    return -0.5 * table.n_new * (np.linalg.slogdet(2 * math.pi * cov)[1] + quadratic)


def penalised(lml: float, kind: str, d: int, k: int, n: int) -> dict[str, float]:
    p = n_parameters(kind, d, k)
    return {"AIC": lml - p, "BIC": lml - p / 2 * math.log(n)}


def of_covariance(table: Table, kind: str, k: int) -> dict[str, float]:
    """Scores of one candidate by the rules, from the covariance of complete rows."""
    x = table.x
    n, d = x.shape
    mean, cov = x.mean(0), np.cov(x.T, bias=True)
    fit = maximise(kind, cov, k)
    row = {"worth": worth(table, mean, fit.loading @ fit.loading.T + np.diag(fit.noise))}
    row["laplace"] = laplace(kind, cov, n, k).log_evidence
    row |= penalised(n * fit.lml, kind, d, k, n)
    repeats = held_out(kind, x, k, 5)
    row["5 folds"], row["5 x 5 folds"] = repeats[0], float(np.mean(repeats))
    if kind == "ppca" and k:
        row["minka"] = float(_assess_dimension(np.linalg.eigvalsh(np.cov(x.T))[::-1], k, n))
    return row


def of_estimator(table: Table, kind: str, k: int) -> dict[str, float]:
    """The same where cells are missing."""
    x = table.x
    model = BayesMPT(MODELS[kind](k), random_state=0)
    fit = model.fit(x)
    row = {"worth": worth(table, fit.mean_, fit.get_covariance()), "laplace": fit.laplace(x).log_evidence}
    row |= penalised(fit.log_marginal_likelihood_, kind, x.shape[1], k, len(x))
    folds = KFold(5, shuffle=True, random_state=0).split(x)
    row["5 folds"] = sum(
        float(BayesMPT(MODELS[kind](k), random_state=0).fit(x[a]).score_samples(x[b]).sum()) for a, b in folds
    )
    return row


def searched(table: Table) -> tuple[MarginalLikelihoodSearch, dict[str, list[float]], dict[str, Any]]:
    """What the search says of the candidates, in their order, and of the table."""
    ks = list(range(table.x.shape[1] // 2 + 1))
    grid = [{"model": [MODELS[kind]()], "model__n_components": ks} for kind in KINDS]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        start = time.process_time()
        search = MarginalLikelihoodSearch(BayesMPT(), grid, evidence="auto", random_state=0).fit(table.x)
    found = search.comparison_.loc[search.candidate_names_]
    columns = {"auto": -found["rank"], "expected": found["expected_diff"], "evidence": found["lml"]}
    facts = {
        "ranked_by": search.comparison_.attrs["ranked_by"],
        "misfit": any(issubclass(w.category, MisfitWarning) for w in said),
        "cpu": round(time.process_time() - start, 2),
    }
    columns["weight"] = found["weight"]
    return search, {name: column.tolist() for name, column in columns.items()}, facts


def study(group: str, index: int, seed: int) -> dict[str, Any]:
    """One table, all rules: a line of the kept file."""
    start = time.process_time()
    table = real(REAL[index]) if group == "real" else draw(group, seed, index)
    search, scores, facts = searched(table)
    scores |= {name: [] for name in ("worth", *RULES) if name not in OURS}
    rival = of_estimator if np.isnan(table.x).any() else of_covariance
    for kind, k in candidates(table):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = rival(table, kind, k)
        for name in ("worth", *RULES):
            if name not in OURS:
                scores[name].append(row.get(name, -math.inf))
    if index < N_CHECKED:  # the search's own estimator is the fit that is judged
        best = search.best_estimator_
        own = worth(table, best.mean_, best.get_covariance())
        np.testing.assert_allclose(own, scores["worth"][search.best_index_], atol=0.05)
    n, d = table.x.shape
    unit = {"group": group, "index": index, "seed": seed, "kind": table.kind, "k": table.k, "n": n, "d": d}
    unit |= facts | compact(scores, table.kind)
    return unit | {"seconds": round(time.process_time() - start, 2)}


def compact(scores: dict[str, list[float]], kind: str) -> dict[str, Any]:
    """What a report needs of the scores: losses to the best candidate, each rule's pick, weights within the true kind.

    Picks are indices into the candidates, in the order of `RULES`; None of a rule that scored nothing.
    """
    value = np.array(scores["worth"])
    picks = []
    for rule in RULES:
        score = np.array(scores[rule], dtype=float)
        score[~np.isfinite(score)] = -math.inf
        picks.append(int(np.argmax(score)) if np.isfinite(score).any() else None)
    unit: dict[str, Any] = {"loss": [round(v, 3) for v in value.max() - value], "picks": picks}
    if kind:
        size = len(value) // len(KINDS)
        own = slice(KINDS.index(kind) * size, (KINDS.index(kind) + 1) * size)
        weights = {
            "weight": np.array(scores["weight"], dtype=float)[own],
            "laplace": softmax(np.array(scores["laplace"], dtype=float)[own]),
        }
        unit["weights"] = {rule: [float(f"{w:.4g}") for w in column] for rule, column in weights.items()}
    return unit


# ------------------------------------------------------------------------------------------------------------ report


def judged(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each rule's pick is worth; rules that scored nothing are left out."""
    of = [(kind, k) for kind in KINDS for k in range(row["d"] // 2 + 1)]
    verdicts = {}
    for rule, pick in zip(RULES, row["picks"], strict=True):
        if pick is None:
            continue
        kind, k = of[pick]
        verdicts[rule] = {
            "regret": row["loss"][pick],
            "true": float((kind, k) == (row["kind"], row["k"])),
            "true_k": float(k == row["k"]),
            "kind": float(kind == row["kind"]),
            "few": float(k < row["k"]),
            "many": float(k > row["k"]),
        }
    return verdicts


def verdict(low: float, high: float, limit: float) -> str:
    return "met" if high < limit else "falls short" if low > limit else "undecided"


def of_group(rows: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """Means of each rule, and auto's regret less each other rule's."""
    verdicts = [judged(row) for row in rows]
    part: dict[str, Any] = {"tables": len(rows), "rules": {}}
    for rule in RULES:
        some = [v for v in verdicts if rule in v]
        if not some:
            continue
        own: dict[str, Any] = {m: float(np.mean([v[rule][m] for v in some])) for m in some[0][rule]}
        if rule not in OURS:
            ask = 0.0 if rule in ("AIC", "BIC") else limit
            for ours in OURS:
                own[f"{ours} minus"] = interval(
                    np.array([v[ours]["regret"] - v[rule]["regret"] for v in some])
                )
            own["verdict"] = verdict(*own["auto minus"][1:], ask)
        part["rules"][rule] = own
    part["ranked by hidden rows"] = float(np.mean([row["ranked_by"] == "heldout" for row in rows]))
    part["misfit warned of"] = float(np.mean([row["misfit"] for row in rows]))
    part["cpu of auto, median"] = float(np.median([row["cpu"] for row in rows]))
    part["cpu of a table, mean"] = float(np.mean([row["seconds"] for row in rows]))
    return part


def of_weights(rows: list[dict[str, Any]], rule: str) -> dict[str, Any]:
    """Whether weights within the true kind are hit rates."""
    weight, hit, log_score = [], [], []
    for row in rows:
        w = row["weights"][rule]
        weight.extend(w)
        hit.extend(np.arange(len(w)) == row["k"])
        log_score.append(math.log(max(w[row["k"]], 1e-300)))
    w, h = np.array(weight), np.array(hit)
    sure = w > SURE
    found: dict[str, Any] = {"brier": float(((w - h) ** 2).mean()), "log score": float(np.mean(log_score))}
    found |= {
        "cases": int(sure.sum()),
        "below .05": f"{int(h[w < 1 - SURE].sum())} of {int((w < 1 - SURE).sum())}",
    }
    if sure.any():
        rate = binomtest(int(h[sure].sum()), int(sure.sum())).proportion_ci()
        found["hit rate"] = [float(h[sure].mean()), float(rate.low), float(rate.high)]
    return found


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By group, all groups off the model together and apart; and of PPCA's tables, on which Minka's rule is at home."""
    groups = {name: [r for r in rows if r["group"] == name] for name in ("gaussian", "holes", *OFF, "real")}
    summary: dict[str, Any] = {}
    for name, part in groups.items():
        if len(part) > 1:
            summary[name] = of_group(part, LIMITS.get(name, LIMITS["off"]))
    off = [r for name in OFF for r in groups[name]]
    if len(off) > 1:
        summary["off the model"] = of_group(off, LIMITS["off"])
    ppca = [r for r in groups["gaussian"] if r["kind"] == "ppca"]
    if len(ppca) > 1:
        summary["gaussian, PPCA true"] = of_group(ppca, LIMITS["gaussian"])
    for name, some in (("gaussian", groups["gaussian"]), ("holes", groups["holes"]), ("off the model", off)):
        if name in summary:
            summary[name]["weights"] = {rule: of_weights(some, rule) for rule in ("weight", "laplace")}
    return summary


def show(summary: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in summary.items():
        lines += [
            "",
            f"{name}: {part['tables']} tables, {part['ranked by hidden rows']:.0%} ranked by hidden rows, misfit "
            f"warned of in {part['misfit warned of']:.0%}, {part['cpu of auto, median']:.1f} CPU s a search (median), "
            f"{part['cpu of a table, mean']:.1f} a table, all rules (mean)",
            "| rule | kind and K % | K % | few / many % | kind % | regret | auto minus it | verdict |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for rule, own in part["rules"].items():
            share = {m: f"{own[m]:.0%}" for m in ("true", "true_k", "few", "many", "kind")}
            cells = [rule, share["true"], share["true_k"], f"{share['few']} / {share['many']}", share["kind"]]
            cells.append(f"{own['regret']:.2f}")
            if "auto minus" in own:
                mean, low, high = own["auto minus"]
                cells += [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", own["verdict"]]
            lines.append("| " + " | ".join(cells) + " |")
        for rule, own in part.get("weights", {}).items():
            rate = "{:.0%} [{:.0%}, {:.0%}]".format(*own["hit rate"]) if "hit rate" in own else "-"
            lines.append(
                f"{'auto' if rule == 'weight' else rule}: weight > {SURE:g} is right in {rate} of {own['cases']}, "
                f"< .05 true in {own['below .05']}, log score {own['log score']:.2f}, Brier {own['brier']:.3f}"
            )
    return lines


def tasks(sizes: dict[str, int]) -> list[tuple[str, int]]:
    """All tables, groups in turn."""
    each = {"gaussian": sizes["tables"], "holes": sizes["holes"]}
    each |= {name: math.ceil(sizes["off"] / len(OFF)) for name in OFF} | {"real": len(REAL)}
    longest = max(each.values())
    found = [((i + 0.5) / n, g, i) for g, n in each.items() if n for i in range(min(n, longest))]
    return [(group, index) for _, group, index in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=SIZES["tables"], help="Gaussian, complete")
    parser.add_argument("--holes", type=int, default=SIZES["holes"], help="with 15 %% of the cells missing")
    parser.add_argument("--off", type=int, default=SIZES["off"], help="off the model, a fifth of each law")
    parser.add_argument("--seed", type=int, default=SEED, help="of the tables")
    parser.add_argument("--quick", action="store_true", help="a few tables, results kept apart")
    parser.add_argument("--report", action="store_true", help="on the tables that are kept, without new ones")
    parser.add_argument("--out", type=Path, help="where the summary goes; the JSON lines lie beside it")
    args = parser.parse_args()
    sizes = QUICK if args.quick else {name: getattr(args, name) for name in SIZES}
    seed = QUICK_SEED if args.quick else args.seed
    out = args.out or (RESULTS.with_stem("choice_study_quick") if args.quick else RESULTS)
    kept, wanted = out.with_suffix(".jsonl"), tasks(sizes)
    done = {(r["group"], r["index"]): r for r in stored(out) if r["seed"] == seed}
    start = time.perf_counter()
    try:
        with kept.open("a") as stream, threadpool_limits(limits=1):
            for i, key in enumerate(wanted):
                if key not in done and not args.report:
                    done[key] = study(*key, seed)
                    stream.write(json.dumps(done[key]) + "\n")
                    stream.flush()
                if i % 10 == 9 and not args.report:
                    print(f"{i + 1}/{len(wanted)} tables, {time.perf_counter() - start:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted: reporting what is there")
    rows = [done[key] for key in wanted if key in done]
    summary = summarise(rows)
    result = {
        "command": "python benchmarks/ranking/choice_study.py",
        "seed": seed,
        "asked for": sizes,
        "tables": len(rows),
        "intervals": "mean, then the normal 95 % interval; differences paired by table; hit rates exact binomial",
        "figures": "shares, and nats over N rows (real: over the rows held out)",
        **summary,
        "table": show(summary)[1:],
    }
    store(out, result, rows)
    print("\n".join(show(summary)))
    print(f"\n{len(rows)} tables; written to {out}")


if __name__ == "__main__":
    main()
