"""On a GPU: a deep training step, exact Gaussian processes and nearest neighbours, each beside its peer.

    python benchmarks/speed/gpu.py [--part step exact neighbours]

step: loss and gradients on the 784-400-20 network against Pyro's losses, as in deep_step.py; memory, and utilisation
as the driver reports it, ten times a second. exact: the log marginal likelihood and its gradient, n = 10 000, against
GPyTorch by Cholesky, and by its default, conjugate gradients. neighbours: 30 of them, n = 100 000 and a million, one
evaluation with its gradient and a whole fit; GPyTorch's VNNGP trained as long on 100 000, its bound at the end.
Trainings at equal wall time: `deep_training.py --device cuda`.

Asked: a step, batches of 128 to 32 768, no slower and its memory no more; exact no slower; the neighbours for as long
as the peer.

Found, on one NVIDIA H100 and one thread of its host. Step, ten draws against `RenyiELBO(10)`: 0.85, 0.88, 0.98 and 0.98
times as fast. One draw against `Trace_ELBO`: 0.81, 0.82, 0.83 and 0.96 times, so slower: some milliseconds of Python,
which batches below 8192 do not hide. Memory is 0.95 to 1.0 of the peer's; utilisation 14, 21, 72 and 87 % (peer 12, 34,
67 and 89 %). Exact: 1.25 times as fast as by Cholesky, the same number; by default the peer takes half our time and is
996 nats off. Neighbours: a fit with 30 takes 2.4 s for 100 000 points and 26 s for a million. VNNGP could not be
started there (its search needs faiss for the card), so it is not compared.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pyro
import torch
from torch import Tensor

from bayes_mpt import BayesMPT
from bayes_mpt.models import VAE, GaussianProcess
from bayes_mpt.predictors import Exact, NearestNeighbors
from bayes_mpt.program.store import OwnStore

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from deep.deep_step import PAIRS, cleared, steps
from gaussian_process_speed import NOISE, draw, matern
from timing import Report, interleave, run

PARTS = ("step", "exact", "neighbours")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
N_NEIGHBOURS, INDUCING_BATCH = 30, 256


def waited(call: Callable[[], Any]) -> Callable[[], Any]:
    """With all its work on the device done."""

    def whole() -> Any:
        out = call()
        if GPU:
            torch.cuda.synchronize()
        return out

    return whole


@contextmanager
def utilisation() -> Iterator[list[int]]:
    """Shares of the time in which the device computes, per cent."""
    found: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            found.append(torch.cuda.utilization())

    watcher = threading.Thread(target=watch)
    if GPU:
        watcher.start()
    try:
        yield found
    finally:
        over.set()
        if GPU:
            watcher.join()


def step(report: Report, quick: bool) -> None:
    for batch in (128,) if quick else (128, 1024, 8192, 32768):
        pyro.clear_param_store()
        torch.manual_seed(0)
        x = (torch.rand(batch, 784) < 0.2).float().to(DEVICE)
        table = {name: waited(cleared(call)) for name, call in steps(VAE(20, hidden=(400,)), x).items()}
        timings = interleave(table, 3 if quick else 30)
        for ours, peer in PAIRS.items():
            report.compare(f"{ours} against {peer}, batch {batch}", timings[peer], timings[ours])
        for name in table:
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            with utilisation() as found:
                end = time.perf_counter() + (0.2 if quick else 1.0)
                while time.perf_counter() < end:
                    table[name]()
            report.row(
                step=name,
                batch=batch,
                milliseconds=1e3 * timings[name].median,
                utilisation=float(np.median(found)) if found else None,
                peak_GB=torch.cuda.max_memory_allocated() / 1e9 if GPU else None,
            )


def at(params: dict[str, Any]) -> None:
    """Parameters in Pyro's store."""
    for name, value in params.items():
        pyro.get_param_store()[name] = torch.as_tensor(value, dtype=torch.float64, device=DEVICE)


TRUTH = {
    "mean.constant": 0.0,
    "noise": NOISE,
    "kernel.outputscale": 1.0,
    "kernel.base_kernel.lengthscale": [[0.1]],
}


def exact(report: Report, quick: bool) -> None:
    X, y = (torch.from_numpy(a).to(DEVICE) for a in draw(500 if quick else 10_000, 0))

    class Peer(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any):
            super().__init__(X, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), matern()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    peer = Peer(likelihood).double().to(DEVICE)
    likelihood.double().to(DEVICE)
    likelihood.noise, peer.covar_module.outputscale, peer.covar_module.base_kernel.lengthscale = (
        NOISE,
        1.0,
        0.1,
    )
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, peer)
    peer.train()

    def theirs(n_dense: int) -> Callable[[], float]:
        def call() -> float:
            peer.zero_grad()
            with gpytorch.settings.max_cholesky_size(n_dense):
                value = mll(peer(X), y) * len(y)
                value.backward()
            return float(value)

        return call

    with OwnStore():
        bound = Exact().bind(GaussianProcess(matern()), (X, y))
        at(TRUTH)

        def ours() -> float:
            for _, leaf in pyro.get_param_store().named_parameters():
                leaf.grad = None
            value = bound.read((X, y)).score().sum()
            value.backward()
            return float(value.detach())

        calls = {"Cholesky": theirs(10**6), "default": theirs(800), "ours": ours}
        timings = interleave({k: waited(c) for k, c in calls.items()}, 2 if quick else 3)
    for name in ("Cholesky", "default"):
        report.compare(
            f"n = {len(y)}, exact, against GPyTorch by {name}",
            timings[name],
            timings["ours"],
            lml_of_peer=timings[name].result,
            lml=timings["ours"].result,
        )


def neighbours(report: Report, quick: bool) -> None:
    for n in (2000,) if quick else (100_000, 1_000_000):
        inputs, outputs = draw(n, 0, n_waves=500)
        X, y = torch.from_numpy(inputs).to(DEVICE), torch.from_numpy(outputs).to(DEVICE)
        with OwnStore():
            bound = NearestNeighbors(N_NEIGHBOURS).bind(GaussianProcess(matern()), (X, y))
            at(TRUTH)

            def once(bound: Any = bound, X: Tensor = X, y: Tensor = y) -> float:
                for _, leaf in pyro.get_param_store().named_parameters():
                    leaf.grad = None
                value = bound.read((X, y)).score().sum()
                value.backward()
                return float(value.detach())

            timing = interleave({"": waited(once)}, 3)[""]
        report.row(n=n, evaluation_s=timing.median, lml_at_truth=timing.result)
        start = time.perf_counter()
        with utilisation() as found:
            fitted = BayesMPT(
                GaussianProcess(matern()),
                predictor=NearestNeighbors(N_NEIGHBOURS),
                device=DEVICE,
                random_state=0,
            ).fit(inputs, outputs)
        took = time.perf_counter() - start
        report.row(
            n=n,
            fit_s=took,
            lml=fitted.log_marginal_likelihood_,
            lengthscale=float(fitted.params_["kernel.base_kernel.lengthscale"].item()),
            utilisation=float(np.mean(found)) if found else None,
        )
    n = 2000 if quick else 100_000
    X, y = (torch.from_numpy(a).float().to(DEVICE) for a in draw(n, 0, n_waves=500))
    report.row(n=n, peer="VNNGP", **vnngp(X, y, 2.0 if quick else 20.0))


def vnngp(X: Tensor, y: Tensor, seconds: float) -> dict[str, float]:
    """Its bound on all rows after some seconds of Adam (rate 0.01), which do not count how long it takes to begin."""

    class Model(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            q = gpytorch.variational.MeanFieldVariationalDistribution(len(X))
            strategy = gpytorch.variational.NNVariationalStrategy(
                self, X, q, k=N_NEIGHBOURS, training_batch_size=INDUCING_BATCH
            )
            super().__init__(strategy)
            self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), matern()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    begun = time.perf_counter()
    torch.manual_seed(0)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(DEVICE)
    model = Model().to(DEVICE)
    mll = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(y))
    adam = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.01)
    model.train()
    n_steps, start = 0, time.perf_counter()
    last: list[float] = []
    while time.perf_counter() - start < seconds:
        adam.zero_grad()
        out = model.variational_strategy(x=None)
        index = model.variational_strategy.current_training_indices
        value = mll(out, y[index])
        (-value).backward()
        adam.step()
        last = [*last[-len(y) // INDUCING_BATCH :], float(value.detach())]  # about an epoch of them
        n_steps += 1
    return {
        "start_s": start - begun,
        "seconds": seconds,
        "steps": n_steps,
        "bound": float(np.mean(last)) * len(y),
        "lengthscale": float(model.covar_module.base_kernel.lengthscale.detach()),
    }


def main(report: Report, args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    report.note(torch.cuda.get_device_name() if GPU else "no GPU: nothing to be learnt from these figures")
    for name, part in zip(PARTS, (step, exact, neighbours), strict=True):
        if args.part is None or name in args.part:
            try:
                part(report, args.quick)
            except (RuntimeError, ImportError) as error:  # the other parts are worth having
                report.row(part=name, failed=str(error).splitlines()[0])


if __name__ == "__main__":
    run(main, __file__, __doc__, lambda parser: parser.add_argument("--part", nargs="+", choices=PARTS))
