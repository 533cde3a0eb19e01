"""A table larger than one likes to copy: fits of a memory map, in time and memory.

1 000 000 x 100 float64 (800 MB) in a temporary file, ten latents, every column with its own noise. Time: one product
``X.T @ X`` of the whole map, the file in the page cache, against a fit, interleaved. Memory: each fit in a fresh
process whose anonymous memory (RssAnon; the map's own pages do not count) is sampled every millisecond from outside,
less what it had after its imports and the opening of the map.

Asked: under 700 MB of anonymous memory, and at most 3 times the time of the pass.

Found: 39 to 50 MB, and 1.8 to 1.9 times.
"""

import select
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import bayes_mpt.models
from bayes_mpt import BayesMPT, data_digest
from bayes_mpt.program.statistics import SufficientStatistics

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, interleave, run

FITS = {"PPCA(10)": "PPCA(10)", "FactorAnalysis(10)": "FactorAnalysis(10)", "default": "None"}
CHILD = """
import sys
import numpy as np
from memory_map import estimator
from timing import threads
path, rows, tokens, fit, n_threads = sys.argv[1:]
x = np.memmap(path, dtype=np.float64, mode="r", shape=(int(rows), int(tokens)))
with threads(int(n_threads)):
    print("ready", flush=True)
    sys.stdin.readline()
    model = estimator(fit).fit(x)
    print("done", model.n_components_, flush=True)
    sys.stdin.readline()
"""


def estimator(name):
    kind, _, k = FITS[name].rstrip(")").partition("(")
    return BayesMPT(getattr(bayes_mpt.models, kind)(int(k))) if k else BayesMPT()


def write(path, n_rows, n_tokens):
    rng = np.random.default_rng(0)
    loading = rng.normal(size=(10, n_tokens))
    noise_sd = rng.uniform(0.5, 2, n_tokens)
    x = np.memmap(path, dtype=np.float64, mode="w+", shape=(n_rows, n_tokens))
    for start in range(0, n_rows, 50_000):
        n = min(50_000, n_rows - start)
        x[start : start + n] = (
            rng.normal(size=(n, 10)) @ loading + noise_sd * rng.normal(size=(n, n_tokens)) + 3.0
        )
    x.flush()


def anonymous(pid):
    """MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not report RssAnon")


def peak(path, shape, fit, n_threads):
    """MB of anonymous memory after the imports, and beyond that at the fit's peak."""
    command = [sys.executable, "-c", CHILD, path, *map(str, shape), fit, str(n_threads)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    assert child.stdin and child.stdout
    child.stdout.readline()
    start = most = anonymous(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    while not select.select([child.stdout], [], [], 0.001)[0]:
        most = max(most, anonymous(child.pid))
    answer = child.stdout.readline()
    child.stdin.write("\n")
    child.stdin.close()
    if child.wait() or not answer.startswith("done"):
        raise RuntimeError(f"the fit {fit} failed")
    return start, most - start


def main(report: Report, args):
    shape = (100_000, 100) if args.quick else (1_000_000, 100)
    repeats = args.repeats or (3 if args.quick else 7)
    report.note(f"{shape[0]} x {shape[1]} float64, {np.prod(shape) * 8 / 1e6:.0f} MB, file in the page cache")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.bin")
        write(path, *shape)
        x = np.memmap(path, dtype=np.float64, mode="r", shape=shape)
        calls = {"product": lambda: x.T @ x}
        calls |= {name: lambda name=name: estimator(name).fit(x) for name in FITS}
        # where the time goes: the passes over the rows, each alone
        calls |= {"check and digest": lambda: data_digest(x), "moments": lambda: SufficientStatistics(x)}
        timings = interleave(calls, repeats)
        product = timings["product"]
        for name in FITS:
            start, beyond = peak(path, shape, name, args.threads)
            ratios = report.compare(
                name, product, timings[name], imports_MB=round(start), peak_beyond_MB=round(beyond)
            )
            slower = [1 / r for r in ratios]
            report.target(f"{name}: under 700 MB beyond the import", beyond < 700, f"{beyond:.0f} MB")
            report.target(
                f"{name}: within 3 times one X.T @ X",
                float(np.median(slower)) <= 3,
                f"{np.median(slower):.2f} times [{min(slower):.2f} - {max(slower):.2f}]",
            )
        for name in ("check and digest", "moments"):
            report.row(
                part=name, seconds=timings[name].median, of_one_product=timings[name].median / product.median
            )


if __name__ == "__main__":
    run(main, __file__, __doc__)
