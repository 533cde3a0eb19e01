"""Which rule finds the latent dimension? A study on synthetic tables of known dimension.

    python benchmarks/ranking/selection_study.py                 # 1000 tables, about 8 minutes on one core
    python benchmarks/ranking/selection_study.py --quick         # 40 tables

Half of the tables come from probabilistic PCA, half from factor analysis with clearly unequal noise variances. On each
table every rule chooses among the same candidates, K = 1 .. min(D // 2, 8):

- laplace: the package's default, `laplace_proportional` (PPCA) or `laplace_diagonal` (factor analysis);
- minka: scikit-learn's ``PCA(n_components="mle")`` kept to the same candidates, which assumes equal noise;
- 5 folds, 5 x 5 folds: held-out log likelihood; the first of the five repeats is the rule "5 folds";
- AIC, BIC: penalised maximum likelihood, with the rotations taken off the count of parameters.

For speed the fits are made on covariances by `predictors.gaussian.profile`, which `BayesMPT.fit` itself uses, and not
through the estimators; on the first tables of each kind the numbers are asserted to be those of
`MarginalLikelihoodSearch`.

A fit is worth its expected log density of a new row, in closed form because the truth is known. The oracle is the best
of all candidates; for factor analysis these are both the maximum of the likelihood and the maximum a posteriori at
which the default rule expands. "True K": the rule finds the K of the truth. "Oracle": it finds the oracle's K.
"Regret": what its pick, fitted by maximum likelihood as `BayesMPT.fit` does, loses against the oracle, in nats over N
rows. Differences are paired by table, with normal 95 % intervals. A second part puts both kinds of model into one grid
and asks how often the right kind comes first.

Finished tables are kept as JSON lines, and a run with the same arguments goes on from them; after a change of the
evidence, ``--rescore`` computes the default rule anew on the kept tables, whose folds need no new fits.

Asked: no paired interval wholly on the wrong side, against Minka, 5 folds, 5 x 5 folds, AIC and BIC on 1000 tables.

Found: none is; the table is in docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.decomposition._pca import _assess_dimension
from sklearn.model_selection import KFold
from sklearn.utils import check_random_state

from bayes_mpt.evidence import LaplaceEvidence, laplace_diagonal, laplace_proportional
from bayes_mpt.predictors.gaussian.profile import Factors, NoiseFloorError, diagonal, proportional
from bayes_mpt.program.statistics import Covariance

RESULTS = Path(__file__).with_suffix(".json")
LOG_2PI = math.log(2 * math.pi)
KINDS = ("ppca", "fa")
NAMES = {"ppca": "PPCA", "fa": "factor analysis"}
RULES = ("laplace", "minka", "5 folds", "5 x 5 folds", "AIC", "BIC")
N_CHECKED = 3  # tables of each kind compared with MarginalLikelihoodSearch
FOLD_SEED = 0


class Truth(NamedTuple):
    kind: str
    x: np.ndarray  # (N, D), of mean zero
    cov: np.ndarray  # (D, D), the true one
    n_latents: int
    signal: float  # sd of a loading over the typical sd of the noise
    spread: float  # largest noise variance over the least


def draw(seed: int, index: int) -> Truth:
    """A table: N log-uniform on 60-500, D on 8-30, K on 1-5, signal log-uniform on 0.2-1.5."""
    rng = np.random.default_rng([seed, index])
    kind = KINDS[index % 2]
    n, d = round(np.exp(rng.uniform(math.log(60), math.log(500)))), int(rng.integers(8, 31))
    k = int(rng.integers(1, min(5, d // 2 - 1) + 1))
    signal = float(np.exp(rng.uniform(math.log(0.2), math.log(1.5))))
    w = signal * rng.uniform(0.5, 1.5, k) * rng.normal(size=(d, k))
    noise = np.ones(d)
    if kind == "fa":
        half_range = rng.uniform(math.log(10), math.log(100)) / 2
        noise = np.exp(rng.uniform(-half_range, half_range, d))
    x = rng.normal(size=(n, k)) @ w.T + rng.normal(size=(n, d)) * np.sqrt(noise)
    return Truth(kind, x, w @ w.T + np.diag(noise), k, signal, float(noise.max() / noise.min()))


def candidates(truth: Truth) -> range:
    return range(1, min(truth.x.shape[1] // 2, 8) + 1)


def log_density(fit: Factors, second_moment: np.ndarray) -> float:
    """Mean log density of rows whose second moment about the fitted mean is given."""
    root = np.sqrt(fit.noise)
    scaled = second_moment / root / root[:, None]
    explained = np.einsum("ik,ij,jk->k", fit.vectors, scaled, fit.vectors)
    quadratic = np.trace(scaled) - ((1 - 1 / fit.spectrum) * explained).sum()
    log_det = np.log(fit.noise).sum() + np.log(fit.spectrum).sum()
    return -0.5 * (len(root) * LOG_2PI + log_det + quadratic)


def maximise(kind: str, cov: np.ndarray, k: int) -> Factors:
    held = Covariance(cov)
    return proportional(held, k, np.ones(len(cov))) if kind == "ppca" else diagonal(held, k)


def laplace(kind: str, cov: np.ndarray, n: int, k: int) -> LaplaceEvidence:
    if kind == "ppca":
        return laplace_proportional(cov, n, k, np.ones(len(cov)))
    return laplace_diagonal(cov, n, k)


def n_parameters(kind: str, d: int, k: int) -> int:
    return d * k - k * (k - 1) // 2 + (1 if kind == "ppca" else d)


def held_out(kind: str, x: np.ndarray, k: int, n_repeats: int) -> list[float]:
    """Total held-out log likelihood of each repeat of five folds."""
    base = int(check_random_state(FOLD_SEED).randint(2**31 - 1))
    totals = []
    for repeat in range(n_repeats):
        total = 0.0
        for train, test in KFold(5, shuffle=True, random_state=base + repeat).split(x):
            mean = x[train].mean(0)
            fit = maximise(kind, np.cov(x[train].T, bias=True), k)
            total += len(test) * log_density(fit, (x[test] - mean).T @ (x[test] - mean) / len(test))
        totals.append(total)
    return totals


def scores(kind: str, truth: Truth, n_repeats: int) -> dict[str, list[float]]:
    """All rules' scores of the candidates of one kind, and what each fit is worth on new rows (nats over N rows)."""
    x = truth.x
    n, d = x.shape
    cov, mean = np.cov(x.T, bias=True), x.mean(0)
    moment = truth.cov + np.outer(mean, mean)  # of new rows, about the fitted mean
    table: dict[str, list[float]] = {
        name: [] for name in ("laplace", "5 folds", "5 x 5 folds", "AIC", "BIC", "worth", "worth at the MAP")
    }
    for k in candidates(truth):
        row = dict.fromkeys(table, -math.inf)
        evidence = laplace(kind, cov, n, k)
        row["worth at the MAP"] = n * log_density(evidence.factors, moment)
        try:
            fit = maximise(kind, cov, k)
        except NoiseFloorError:  # no maximum: nothing can be fitted, and every rule passes by
            pass
        else:
            lml, p = n * fit.lml, n_parameters(kind, d, k)
            row["worth"] = n * log_density(fit, moment)
            row |= {"laplace": evidence.log_evidence, "AIC": lml - p, "BIC": lml - p / 2 * math.log(n)}
            try:
                repeats = held_out(kind, x, k, n_repeats)
                row["5 folds"], row["5 x 5 folds"] = repeats[0], float(np.mean(repeats))
            except NoiseFloorError:
                pass
        for name, value in row.items():
            table[name].append(round(value, 4))
    return table


def rescore(row: dict[str, Any]) -> dict[str, Any]:
    """A kept table with the default rule computed anew; what its rivals scored stays."""
    truth = draw(row["seed"], row["index"])
    n = len(truth.x)
    cov, mean = np.cov(truth.x.T, bias=True), truth.x.mean(0)
    moment = truth.cov + np.outer(mean, mean)
    for kind, table in row["scores"].items():
        for i, k in enumerate(candidates(truth)):
            evidence = laplace(kind, cov, n, k)
            table["worth at the MAP"][i] = round(n * log_density(evidence.factors, moment), 4)
            if math.isfinite(table["worth"][i]):
                table["laplace"][i] = round(evidence.log_evidence, 4)
    return row


def minka(truth: Truth) -> list[float]:
    spectrum = np.linalg.eigvalsh(np.cov(truth.x.T))[::-1]
    return [float(_assess_dimension(spectrum, k, len(truth.x))) for k in candidates(truth)]


def run(task: tuple[int, int]) -> dict[str, Any]:
    """One table, all rules."""
    seed, index = task
    start = time.perf_counter()
    truth = draw(seed, index)
    other = KINDS[1 - KINDS.index(truth.kind)]
    found = {truth.kind: scores(truth.kind, truth, 5), other: scores(other, truth, 1)}
    found[truth.kind]["minka"] = minka(truth)
    n, d = truth.x.shape
    facts = {"seed": seed, "index": index, "kind": truth.kind, "n": n, "d": d, "k": truth.n_latents}
    facts |= {"signal": truth.signal, "spread": truth.spread, "scores": found}
    return facts | {"seconds": time.perf_counter() - start}


def check(truth: Truth, found: dict[str, dict[str, list[float]]], *, all_rules: bool = True) -> None:
    """The numbers are those of the package's search and of scikit-learn; of kept tables only the default's are new."""
    from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
    from bayes_mpt.models import PPCA, FactorAnalysis

    for kind, model in (("ppca", PPCA(1)), ("fa", FactorAnalysis(1))):
        few = list(candidates(truth))[: truth.n_latents + 1]
        for rule, evidence in (("laplace", "auto"), ("5 folds", "heldout"))[: 1 + all_rules]:
            search = MarginalLikelihoodSearch(
                BayesMPT(model),
                {"model__n_components": few},
                evidence=evidence,
                random_state=FOLD_SEED,
                error_score="raise",
            ).fit(truth.x)
            np.testing.assert_allclose(search.cv_results_["lml"], found[kind][rule][: len(few)], atol=1e-3)
        if not all_rules:
            continue
        best = search.best_estimator_
        c, shift = best.get_covariance(), best.mean_
        value = np.linalg.slogdet(2 * math.pi * c)[1] + np.trace(
            np.linalg.solve(c, truth.cov + np.outer(shift, shift))
        )
        worth = found[kind]["worth"][few.index(best.n_components_)]
        np.testing.assert_allclose(-0.5 * len(truth.x) * value, worth, atol=1e-3)
    chosen = PCA("mle", svd_solver="full").fit(truth.x).n_components_
    if chosen in candidates(truth):
        assert chosen == candidates(truth)[int(np.argmax(found[truth.kind]["minka"]))]


# ------------------------------------------------------------------------------------------------------------ report


def judge(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each rule's pick is worth, among candidates of the truth's kind."""
    table = row["scores"][row["kind"]]
    worth, at_map = np.array(table["worth"]), np.array(table["worth at the MAP"])
    best = max(worth.max(), at_map.max())
    oracle = int(np.argmax(np.maximum(worth, at_map)))
    verdicts = {}
    for rule in RULES:
        pick = int(np.argmax(table[rule]))
        verdicts[rule] = {
            "true": float(pick + 1 == row["k"]),
            "oracle": float(pick == oracle),
            "oracle_ml": float(pick == int(np.argmax(worth))),
            "regret": best - worth[pick],
            "regret_map": best - at_map[pick],
            "pick": pick + 1,
        }
    return verdicts


def judge_kinds(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The same with both kinds in one grid."""
    every = [np.concatenate([row["scores"][kind][name] for kind in KINDS]) for name in
             ("worth", "worth at the MAP")]  # fmt: skip
    best = max(every[0].max(), every[1].max())
    verdicts = {}
    for rule in ("laplace", "5 folds", "AIC", "BIC"):
        together = np.concatenate([row["scores"][kind][rule] for kind in KINDS])
        pick = int(np.argmax(together))
        kind = KINDS[pick >= len(row["scores"]["ppca"][rule])]
        verdicts[rule] = {"right": float(kind == row["kind"]), "regret": best - every[0][pick]}
    return verdicts


def interval(values: np.ndarray) -> list[float]:
    """Mean and its normal 95 % interval."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for kind in KINDS:
        here = [row for row in rows if row["kind"] == kind]
        if len(here) < 2:
            continue
        verdicts = [judge(row) for row in here]
        part: dict[str, Any] = {"sets": len(here), "rules": {}}
        for rule in RULES:
            measures = ("true", "oracle", "oracle_ml", "regret", "regret_map")
            own = {name: interval(np.array([v[rule][name] for v in verdicts])) for name in measures}
            own["low"], own["high"] = (
                float(np.mean([v[rule]["pick"] < row["k"] for v, row in zip(verdicts, here, strict=True)])),
                float(np.mean([v[rule]["pick"] > row["k"] for v, row in zip(verdicts, here, strict=True)])),
            )
            if rule != "laplace":
                own["laplace_minus_rule"] = {
                    name: interval(np.array([v["laplace"][name] - v[rule][name] for v in verdicts]))
                    for name in ("true", "oracle", "oracle_ml", "regret")
                }
            part["rules"][rule] = own
        kinds = [judge_kinds(row) for row in here]
        part["both_kinds"] = {
            rule: {name: interval(np.array([v[rule][name] for v in kinds])) for name in ("right", "regret")}
            for rule in kinds[0]
        }
        summary[kind] = part
    both = [judge_kinds(row) for row in rows]
    summary["right_kind"] = {
        rule: interval(np.array([v[rule]["right"] for v in both])) for rule in ("laplace", "5 folds", "AIC", "BIC")
    }  # fmt: skip
    return summary


def show(summary: dict[str, Any]) -> str:
    share = lambda v: f"{100 * v[0]:5.1f}"  # noqa: E731
    pair = lambda v: f"{100 * v[0]:+5.1f} [{100 * v[1]:+5.1f}, {100 * v[2]:+5.1f}]"  # noqa: E731
    lines = []
    for kind in KINDS:
        if kind not in summary:
            continue
        part = summary[kind]
        lines.append(f"\n{NAMES[kind]}, {part['sets']} tables; differences are laplace minus the rule\n")
        lines.append(
            "| rule | true K % | too few / many % | oracle % | regret | oracle: difference | regret: difference |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for rule, own in part["rules"].items():
            difference = own.get("laplace_minus_rule")
            cells = [
                share(own["true"]),
                f"{100 * own['low']:.0f} / {100 * own['high']:.0f}",
                share(own["oracle"]),
            ]
            cells += [f"{own['regret'][0]:.2f}"]
            if difference:
                mean, low, high = difference["regret"]
                cells += [pair(difference["oracle"]), f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"]
            lines.append(f"| {rule} | " + " | ".join(cells + [""] * (6 - len(cells))) + " |")
        if kind == "fa":
            value = part["rules"]["laplace"]["regret_map"][0]
            lines.append(f"\nRegret of the default's pick fitted at its MAP: {value:.2f} nats.")
        for rule, own in part["both_kinds"].items():
            lines.append(
                f"Both kinds in one grid, {rule}: right kind {share(own['right'])} %, regret {own['regret'][0]:.2f}"
            )
    for rule, value in summary["right_kind"].items():
        lines.append(f"Right kind over all tables, {rule}: {pair(value)} %")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=1000, help="tables, half of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--seed", type=int, default=20260, help="of the tables")
    parser.add_argument("--quick", action="store_true", help="40 tables, results kept apart")
    parser.add_argument("--rescore", action="store_true", help="the default rule anew on the kept tables")
    parser.add_argument("--out", type=Path, help="where the summary goes; the JSON lines lie beside it")
    args = parser.parse_args()
    n_sets = 40 if args.quick else args.sets
    out = args.out or (RESULTS.with_stem("selection_study_quick") if args.quick else RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_suffix(".jsonl")
    rows: dict[int, dict[str, Any]] = {}
    others = []  # tables of other seeds, or beyond the number asked for
    if kept.exists():
        for line in kept.read_text().splitlines():
            row = json.loads(line)
            if row["seed"] == args.seed and row["index"] < n_sets:
                rows[row["index"]] = row
            else:
                others.append(row)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # of the processes about to start
    if args.rescore:
        with get_context("spawn").Pool(args.jobs) as pool:
            rows = {row["index"]: row for row in pool.imap_unordered(rescore, rows.values(), chunksize=8)}
        for index in range(2 * N_CHECKED):
            if index in rows:
                check(draw(args.seed, index), rows[index]["scores"], all_rules=False)
        kept.write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows.values()]))
    todo = [(args.seed, i) for i in range(n_sets) if i not in rows]
    start = time.perf_counter()
    try:
        with kept.open("a") as stream, get_context("spawn").Pool(args.jobs) as pool:
            for done, row in enumerate(pool.imap_unordered(run, todo), 1):
                if row["index"] < 2 * N_CHECKED:
                    check(draw(args.seed, row["index"]), row["scores"])
                rows[row["index"]] = row
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                if done % 50 == 0:
                    print(f"{done}/{len(todo)} tables, {time.perf_counter() - start:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted: reporting what is there")
    if len(rows) < 2:
        return
    ordered = [rows[i] for i in sorted(rows)]
    summary = summarise(ordered)
    result = {
        "command": "python benchmarks/ranking/selection_study.py",
        "seed": args.seed,
        "sets": len(ordered),
        "design": "N 60-500 and signal 0.2-1.5 log-uniform, D 8-30, K 1-5, K candidates 1 .. min(D // 2, 8)",
        "intervals": "mean, then the normal 95 % interval; differences paired by table",
        "units": "shares, and nats over N rows",
        **summary,
        "table": show(summary).strip().splitlines(),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(show(summary))
    print(f"\n{len(ordered)} tables; written to {out}")


if __name__ == "__main__":
    main()
