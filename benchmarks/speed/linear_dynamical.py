"""A local level of 100 to 10 000 steps, written as a loop: time against length, beside two Kalman filters.

    python benchmarks/speed/linear_dynamical.py

All compute the same log-likelihood, the first level's distribution known: checked to 1e-8 of itself at every length.
The peers are told the model by its matrices: statsmodels' compiled Kalman filter, and Pyro's `GaussianHMM`, a parallel
scan. Ours is the program, which has to be run in Python; so it is timed whole (run, read, scored), and without
that (scored from a map that has been read). With a gradient to both variances, `GaussianHMM` is the peer.
Slopes are of log time (of the CPU, medians) on log length, least squares.

Asked: equal log-likelihoods, and time linear in the length.

Found (`--repeats 3`, on an Intel Xeon with other jobs on both cores): log-likelihoods equal to 2e-14 of themselves;
slopes of 1.06 and, with the gradient, 1.00 (between 3162 and 10 000 steps 1.15 and 1.21). It is slower than either
peer. In CPU time at 10 000 steps the program run, read and scored takes 1400 times as long as statsmodels and 1100
times as long as `GaussianHMM` (5.8 s against 4 and 5 ms; with the gradient 360 times `GaussianHMM`), nearly all of it
Python running the program. Scored from a map once read it takes 5.5 and 4.2 times as long (23 ms).
"""

import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from torch.distributions import constraints

from bayes_mpt.predictors import MarkovGaussian, choose

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run

NOISE, STEP, START = (
    15099.0,
    1469.0,
    (1000.0, 300.0),
)  # variances of the Nile's level; mean and sd of the first level


def level(x):
    noise = pyro.param("noise", x.new_tensor(NOISE), constraint=constraints.positive)
    step = pyro.param("step", x.new_tensor(STEP), constraint=constraints.positive)
    z = x.new_tensor(START[0])
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Normal(z, step.sqrt() if t else START[1]))
        pyro.sample(f"x_{t}", dist.Normal(z, noise.sqrt()), obs=x[t])


def series(n):
    rng = np.random.default_rng(0)
    walk = START[0] + START[1] * rng.standard_normal() + np.sqrt(STEP) * rng.standard_normal(n).cumsum()
    return walk + np.sqrt(NOISE) * rng.standard_normal(n)


def hidden_markov(x, noise, step):
    """The same as `GaussianHMM`, whose chain starts a step before the first token."""
    eye = torch.eye(1, dtype=x.dtype)
    zero = x.new_zeros(1)
    start = dist.MultivariateNormal(x.new_tensor([START[0]]), (START[1] ** 2 - step) * eye)
    walk, look = dist.MultivariateNormal(zero, step * eye), dist.MultivariateNormal(zero, noise * eye)
    return dist.GaussianHMM(start, eye, walk, eye, look, duration=len(x)).log_prob(x[:, None])


def main(report: Report, args) -> None:
    """Two tables: the log-likelihood, and its gradient as well."""
    lengths = (100, 316, 1000) if args.quick else (100, 316, 1000, 3162, 10_000)
    repeats = args.repeats or (2 if args.quick else 3)
    cpu: dict[str, list[float]] = {}
    gaps = []
    for n in lengths:
        pyro.clear_param_store()
        y = series(n)
        x = torch.tensor(y)
        filter_ = sm.tsa.UnobservedComponents(y, "llevel")
        filter_.ssm.initialize_known(np.array([START[0]]), np.array([[START[1] ** 2]]))
        filter_.ssm.loglikelihood_burn = 0
        found = choose(level, (x,))
        assert isinstance(found, MarkovGaussian)
        leaves = [torch.tensor(v, dtype=x.dtype, requires_grad=True) for v in (NOISE, STEP)]
        with torch.no_grad():
            read = found.read((x,))

        def whole(found=found, x=x):
            with torch.no_grad():
                p = found.read((x,))
                return float(p.score())

        def algebra(read=read):
            with torch.no_grad():
                return float(read.score())

        def whole_gradient(found=found, x=x):
            p = found.read((x,))
            p.score().sum().backward()

        def scan(x=x, leaves=leaves):
            with torch.no_grad():
                return float(hidden_markov(x, *leaves))

        def scan_gradient(x=x, leaves=leaves):
            hidden_markov(x, *leaves).backward()

        calls = {
            "program": whole,
            "algebra": algebra,
            "statsmodels": lambda f=filter_: f.loglike([NOISE, STEP]),
            "GaussianHMM": scan,
            "program, gradient": whole_gradient,
            "GaussianHMM, gradient": scan_gradient,
        }
        timed = interleave(calls, repeats)
        values = [timed[k].result for k in ("program", "algebra", "GaussianHMM")]
        gaps.append(max(abs(v - timed["statsmodels"].result) for v in values) / abs(values[0]))
        for peer in ("statsmodels", "GaussianHMM"):
            for ours in ("program", "algebra"):
                report.compare(f"{n} steps, {ours}, peer {peer}", timed[peer], timed[ours])
        report.compare(
            f"{n} steps, gradient, program, peer GaussianHMM",
            timed["GaussianHMM, gradient"],
            timed["program, gradient"],
        )
        for name, timing in timed.items():
            cpu.setdefault(name, []).append(float(np.median(timing.cpu)))
    slopes = {}
    for name, seconds in cpu.items():
        slopes[name] = float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
        last = float(np.log(seconds[-1] / seconds[-2]) / np.log(lengths[-1] / lengths[-2]))
        report.row(way=name, slope=slopes[name], **{"between the last two": last}, cpu=seconds)
    report.target(
        "same log-likelihood, relative", max(gaps) <= 1e-8, f"largest difference {max(gaps):.1e} of itself"
    )
    for name in ("program", "program, gradient"):
        report.target(
            f"time linear in the length ({name})",
            slopes[name] <= 1.1,
            f"slope {slopes[name]:.2f} on a log-log scale",
        )


if __name__ == "__main__":
    run(main, __file__, __doc__)
