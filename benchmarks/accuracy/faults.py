"""Is anything lost, or anything unfinished used? Long work is pressed, killed, damaged, starved of disk and shared.

Judged from outside, by public names only, in processes forked for each try:

- presses: Ctrl-C at a random moment (to the process alone or to its group) of a fit, of searches with one and two jobs
  and a ``checkpoint_dir``, of a training by epochs with a ``checkpoint``, and inside a write; kills: SIGKILL, likewise.
  Each is made again on what it left, which has to give the numbers of an undisturbed run.
- flips: one bit of one byte of one file; damage: twenty other kinds; malicious: files that run code when they are
  unpickled. The same call has to give the same numbers and a warning of what it has set aside.
- disk: one that is full, or read-only (a tmpfs of 200 kB where one can be mounted, else a limit to the size of files).
- together: two and three searches at once in one folder; threads: fits and scores of 8 threads.

Counted: finished work lost (a finished file is written again; what is all finished is trained again), unfinished or
damaged work used (ranked, or taken up without a word), raw errors (hangs, swallowed presses and stops of more than five
seconds included), foreign code executed, wrong numbers.

Asked: in 100 presses and 60 kills at random moments, 200 flips, 20 other kinds of damage, a malicious file of each
kind, a disk of 200 kB, two and three searches at once, and 400 fits and scores of 8 threads, each of these five counts
is 0.

Found: all five are 0 in 828 tries, in 12 minutes with other jobs on both cores; the disk was a tmpfs of 200 kB.
"""

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pyro
import torch
from scipy.stats import multivariate_normal

from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.masks import UniformSize
from bayes_mpt.models import PPCA, VAE, FactorAnalysis, GaussianMixture, GaussianProcess
from bayes_mpt.training import Ascent, Epochs, Steps

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/, for timing.py
from timing import Report, run

PARTS = ("presses", "kills", "flips", "damage", "malicious", "disk", "together", "threads")
FAULTS = ("lost", "used", "raw", "executed", "wrong")
# of tries: in full, quick
PRESSES = {
    "fit": (25, 2),
    "search": (35, 2),
    "search, 2 jobs": (10, 1),
    "epochs": (20, 2),
    "in a write": (10, 2),
}
KILLS = {"search": (24, 2), "search, 2 jobs": (6, 1), "epochs": (20, 2), "in a write": (10, 2)}
FLIPS, CALLS = (200, 8), (400, 40)
TO_STOP, TO_END = 5.0, 120.0  # seconds after a press; after which a process hangs
CLOSE = {"rtol": 1e-8, "atol": 1e-8}

rng = np.random.default_rng(0)
X = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(80, 6))
CODES = (rng.random((120, 8)) < 0.4).astype(np.float32)
TIMES = np.linspace(0, 1, 20)[:, None]
HEIGHTS = np.sin(5 * TIMES[:, 0]) + 0.1 * rng.normal(size=20)

# ------------------------------------------------------------------------------------------- what is disturbed


def a_fit():
    return BayesMPT(FactorAnalysis(2), masks=UniformSize(6), training=Steps(max_iter=150), random_state=0)


def a_search(folder, n_jobs=None):
    """Three candidates that train for some time."""
    estimator = BayesMPT(FactorAnalysis(), masks=UniformSize(6), training=Steps(max_iter=12), random_state=0)
    return MarginalLikelihoodSearch(
        estimator,
        {"model__n_components": [1, 2, 3]},
        evidence=HeldOut(cv=2),
        random_state=0,
        n_jobs=n_jobs,
        checkpoint_dir=folder,
    )


def a_short_search(folder):
    grid = {"model__n_components": [1, 2, 3]}
    return MarginalLikelihoodSearch(
        BayesMPT(PPCA()), grid, evidence=HeldOut(cv=2), random_state=0, checkpoint_dir=folder
    )


def epochs(folder):
    model = VAE(latent_dim=1, hidden=(4,))
    return BayesMPT(
        model,
        training=Epochs(max_epochs=20, checkpoint=Path(folder) / "training", patience=20),
        random_state=0,
    )


def work(kind, folder):
    """An estimator or search, and its rows."""
    if kind == "fit":
        return a_fit(), X
    if kind == "short search":
        return a_short_search(folder), X
    return (
        (epochs(folder), CODES)
        if kind == "epochs"
        else (a_search(folder, 2 if "2 jobs" in kind else None), X)
    )


def numbers(found):
    """What is compared, by name."""
    if isinstance(found, MarginalLikelihoodSearch):
        return {str(k): float(v) for k, v in found.comparison_["lml"].items()}
    weights = {k: float(np.abs(v).sum()) for k, v in found.params_.items()}
    return {"lml": found.log_marginal_likelihood_, **weights}


def same(found, truth):
    return set(found) == set(truth) and all(np.isclose(found[k], truth[k], **CLOSE) for k in truth)


def what_is_left():
    """State of the process that a call has left behind."""
    left = [f"parameters {list(pyro.get_param_store())}"] if len(pyro.get_param_store()) else []
    left += ["handlers"] if pyro.poutine.runtime._PYRO_STACK else []
    return left + (["default dtype"] if torch.get_default_dtype() != torch.float32 else [])


# --------------------------------------------------------------------------------------- processes of one's own


class Child:
    """A forked process in a group of its own that calls a function; what it returns comes back as JSON."""

    def __init__(self, call, *args):
        reader, writer = os.pipe()
        self.begun = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(reader)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            signal.signal(signal.SIGINT, _raise)
            warnings.simplefilter("always")
            os.write(writer, b"\n")  # it begins
            try:
                found = call(*args)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                found = {"error": f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:400]}
            os.write(writer, json.dumps(found).encode())
            os._exit(0)
        os.close(writer)
        self.reader = os.fdopen(reader, "rb")
        self.reader.readline()

    def signal(self, number, group):
        (os.killpg if group else os.kill)(self.pid, number)

    def result(self):
        """None of a process that was killed."""
        end = time.monotonic() + TO_END
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return {"error": "hangs"}
            time.sleep(0.01)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # workers that it left
        except ProcessLookupError:
            pass
        with self.reader:
            text = self.reader.read()
        return json.loads(text) if text else None


PRESSED = []


def _raise(*_):
    PRESSED.append(time.monotonic())
    raise KeyboardInterrupt


def in_child(call, *args):
    return Child(call, *args).result()


def undisturbed(kind, folder):
    """Numbers, warnings, seconds, and draws of Pyro's sites: how much was computed."""
    begun, samples, counted = time.monotonic(), pyro.sample, [0]

    def counting(*args, **kwargs):
        counted[0] += 1
        return samples(*args, **kwargs)

    pyro.sample = counting
    estimator, rows = work(kind, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        estimator.fit(rows)
    pyro.sample = samples
    texts = [str(w.message) for w in said if "converge" not in str(w.message)]
    return {
        "numbers": numbers(estimator),
        "said": texts,
        "seconds": time.monotonic() - begun,
        "samples": counted[0],
        "left": what_is_left(),
    }


def disturbed(kind, folder, truth, at_write, number):
    """The faults of a call at which somebody presses; at the n-th write, if that is asked for."""
    estimator, rows = work(kind, folder)
    before = set(vars(estimator))
    if at_write is not None:
        _strike(at_write, number)
    faults, partial = [], None
    try:
        estimator.fit(rows)
        ended = time.monotonic()
        if PRESSED and PRESSED[0] < ended:
            faults.append(("raw", "a press was swallowed"))
            if not same(numbers(estimator), truth):
                faults.append(("used", "an interrupted one is ranked or looks finished"))
    except KeyboardInterrupt:
        ended = time.monotonic()
        if isinstance(estimator, MarginalLikelihoodSearch):
            partial = getattr(estimator, "partial_", None)
            if not isinstance(partial, pd.DataFrame):
                faults.append(("raw", f"partial_ is {partial!r}"))
            else:
                found = {} if partial.empty else partial["lml"].dropna().to_dict()
                if any(not np.isclose(v, truth[str(k)], **CLOSE) for k, v in found.items()):
                    faults.append(("used", f"partial_ has {found}, finished are {truth}"))
        elif hasattr(estimator, "log_marginal_likelihood_"):
            if estimator.converged_ or not getattr(estimator, "interrupted_", False):
                faults.append(("used", "an interrupted fit looks finished"))
            if kind == "fit":
                density = multivariate_normal(estimator.mean_, estimator.get_covariance())
                if not np.isclose(density.logpdf(rows).sum(), estimator.log_marginal_likelihood_, **CLOSE):
                    faults.append(("wrong", "the score of an interrupted fit"))
            elif not np.isfinite(estimator.score(rows)):
                faults.append(("wrong", "the score of an interrupted fit"))
        elif {k for k in set(vars(estimator)) - before if not k.startswith("_")}:
            faults.append(("raw", "half a fit is left"))
    if PRESSED and ended - PRESSED[0] > TO_STOP:
        faults.append(("raw", f"{ended - PRESSED[0]:.1f} s until it stopped"))
    faults += [("raw", f"left behind: {left}") for left in what_is_left()]
    return faults


def _strike(at, number):
    """Be signalled at some step of a write: before or after the n-th fsync or renaming."""
    steps = [0]

    def around(function):
        def struck(*args, **kwargs):
            steps[0] += 1
            if steps[0] == at:
                os.kill(os.getpid(), number)
            found = function(*args, **kwargs)
            steps[0] += 1
            if steps[0] == at:
                os.kill(os.getpid(), number)
            return found

        return struck

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, around(getattr(os, name)))


# ------------------------------------------------------------------------------------------------------ the tally


class Tally:
    """Faults of one line of the table."""

    def __init__(self, report, name):
        self.report, self.name = report, name
        self.tries, self.count, self.first = 0, dict.fromkeys(FAULTS, 0), {}

    def add(self, faults):
        self.tries += 1
        for kind in {kind for kind, _ in faults}:  # one try counts once
            self.count[kind] += 1
        for kind, text in faults:
            self.first.setdefault(kind, text)

    def show(self):
        columns = {
            "lost": "finished lost",
            "used": "unfinished used",
            "raw": "raw errors",
            "wrong": "wrong numbers",
        }
        self.report.row(
            what=self.name,
            tries=self.tries,
            **{columns.get(k, k): n for k, n in self.count.items()},
            first=[f"{k}: {text}" for k, text in self.first.items()],
        )
        for kind, text in self.first.items():
            print(f"      {kind}: {text}", flush=True)


def content(folder):
    """Files by name, with when they were written and what is in them."""
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def again(kind, folder, truth, *, must_say=None, keep=True, untouched=()):
    """Faults of the same call on what lies in its folder."""
    before = content(folder)
    found = in_child(undisturbed, kind, folder)
    if found is None or "error" in found:
        return [("raw", "the same call again: " + ("killed" if found is None else found["error"]))]
    faults = [("raw", f"left behind: {left}") for left in found["left"]]
    if not same(found["numbers"], truth["numbers"]):
        faults.append(
            ("wrong" if must_say is not None else "used", f"{found['numbers']}, not {truth['numbers']}")
        )
    if must_say is not None and not any(must_say in text for text in found["said"]):
        faults.append(("used", f"no warning names {must_say}: {found['said']}"[:300]))
    after = content(folder)
    for name in untouched:
        if name in before and before[name] != after.get(name):
            faults.append(("lost", f"{name} was finished, and is written again"))
    if keep and not faults:
        whole = in_child(undisturbed, kind, folder)
        if whole is None or "error" in whole:
            faults.append(("raw", f"all is finished, and the same call: {whole}"))
        elif whole["samples"] > truth["samples"] // 10 and "jobs" not in kind:
            text = f"all is finished, and {whole['samples']} of {truth['samples']} draws are made"
            faults.append(("lost", text))
    return faults


class Truths:
    """Undisturbed runs, each with the files that it leaves and does not write again."""

    def __init__(self, root):
        self.root, self.known = root, {}

    def __getitem__(self, kind):
        if kind not in self.known:
            folder = self.root / f"undisturbed {kind}"
            folder.mkdir()
            found = in_child(undisturbed, kind, folder)
            if found is None or "error" in found:
                raise RuntimeError(f"undisturbed {kind}: {found}")
            first = content(folder)
            if kind not in ("fit", "epochs"):
                in_child(undisturbed, kind, folder)
            finished = [name for name, c in content(folder).items() if first.get(name) == c]
            self.known[kind] = found | {"folder": folder, "finished": finished}
        return self.known[kind]


# ------------------------------------------------------------------------------------------------------ the parts


def signals(report, truths, n_tries, number, chance):
    for name, tries in n_tries.items():
        tally = Tally(report, f"{'presses' if number == signal.SIGINT else 'kills'}: {name}")
        for i in range(tries):
            kind = name if name != "in a write" else ("search", "epochs")[i % 2]
            truth = truths[kind]
            at = int(chance.integers(1, 17)) if name == "in a write" else None
            with tempfile.TemporaryDirectory() as folder:
                victim = Child(disturbed, kind, folder, truth["numbers"], at, int(number))
                if at is None:
                    time.sleep(float(chance.random()) * 1.05 * truth["seconds"])
                    victim.signal(number, group=bool(number == signal.SIGKILL or i % 2))
                found = victim.result()
                faults = (
                    [("raw", found["error"])] if isinstance(found, dict) else list(map(tuple, found or ()))
                )
                if kind != "fit":
                    finished = truth["finished"] if kind != "epochs" else ()
                    had_begun = kind == "epochs" and any(Path(folder).iterdir())
                    faults += again(
                        kind, folder, truth, keep=kind != "epochs" and i % 3 == 0, untouched=finished
                    )
                    if had_begun and not faults:
                        faults += went_on(folder, truth)
                tally.add(faults)
        tally.show()


def went_on(folder, truth):
    """A training by epochs that is all done costs less than the whole of it."""
    found = in_child(undisturbed, "epochs", folder)
    if found is None or "error" in found:
        return [("raw", f"the training once more: {found}")]
    return [("lost", "the checkpoint is not taken up")] if found["samples"] >= truth["samples"] else []


def flipped(data, chance):
    at = int(chance.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(chance.integers(8)))]) + data[at + 1 :]


def damages(other, chance):
    """Twenty kinds: what becomes of the bytes of a file."""
    return {
        "empty": lambda d: b"",
        "half": lambda d: d[: len(d) // 2],
        "one byte short": lambda d: d[:-1],
        "first byte lost": lambda d: d[1:],
        "a byte more": lambda d: d + b"\0",
        "a line more": lambda d: d + b"\n{}\n",
        "twice": lambda d: d + d,
        "zeros": lambda d: bytes(len(d)),
        "ones": lambda d: b"\xff" * len(d),
        "noise": lambda d: chance.bytes(len(d)),
        "a hole": lambda d: d[: len(d) // 3] + bytes(len(d) // 3) + d[2 * (len(d) // 3) :],
        "backwards": lambda d: d[::-1],
        "halves exchanged": lambda d: d[len(d) // 2 :] + d[: len(d) // 2],
        "first bytes": lambda d: b"\x00\x01\x02\x03" + d[4:],
        "text": lambda d: b"hello\n",
        "another format": lambda d: b'{"version": 999}',
        "not a number": lambda d: b"[NaN, Infinity]",
        "compressed": gzip.compress,
        "line ends": lambda d: d.replace(b"\n", b"\r\n") if b"\n" in d else d.replace(b"\0", b"\r\n", 1),
        "another's": lambda d: other,
    }


def spoiled(truths, kind, spoil, chance):
    """Faults of the same call after one finished file has been spoiled; ``spoil`` of bytes."""
    truth = truths[kind]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "work"
        shutil.copytree(truth["folder"], folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        file = files[int(chance.integers(len(files)))]
        data = file.read_bytes()
        new = spoil(data)
        if new == data or not data:
            return []
        file.write_bytes(new)
        others = [n for n in truth["finished"] if n != str(file.relative_to(folder))]
        untouched = others if kind != "epochs" else ()
        return again(kind, folder, truth, must_say=file.name, keep=False, untouched=untouched)


def flips(report, truths, n, chance):
    tally = Tally(report, "single-bit flips")
    for i in range(n):
        kind = "epochs" if i % 4 == 3 else "short search"
        tally.add(spoiled(truths, kind, lambda data: flipped(data, chance), chance))
    tally.show()


def damage(report, truths, quick, chance):
    tally = Tally(report, "other damage, 20 kinds")
    other = (
        b"".join(c for _, c in content(truths["search"]["folder"]).values())[:4000] if not quick else b"other"
    )
    for i, (name, spoil) in enumerate(damages(other, chance).items()):
        for kind in ("short search", "epochs")[i % 2 if quick else 0 :][: 1 if quick else 2]:
            faults = spoiled(truths, kind, spoil, chance)
            tally.add([(k, f"{name}: {text}") for k, text in faults])
    tally.show()


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def malicious(report, truths):
    def npz(payload):
        file, objects = io.BytesIO(), np.empty(1, dtype=object)
        objects[0] = payload
        np.savez(file, state=objects, header=objects)
        return file.getvalue()

    def written(save, payload):
        file = io.BytesIO()
        save(payload, file)
        return file.getvalue()

    kinds = {
        "pickle": pickle.dumps,
        "torch pickle": lambda p: written(torch.save, {"state": p}),
        "torch pickle, old": lambda p: written(
            lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False), {"state": p}
        ),
        "npz of objects": npz,
        "npy of objects": lambda p: written(lambda x, f: np.save(f, np.array([x], object)), p),
        "joblib": lambda p: written(joblib.dump, p),
    }
    tally = Tally(report, f"malicious files, {len(kinds)} kinds and their old names")
    for name, make in kinds.items():
        for kind in ("short search", "epochs"):
            truth = truths[kind]
            with tempfile.TemporaryDirectory() as root:
                folder, mark = Path(root) / "work", Path(root) / "executed"
                shutil.copytree(truth["folder"], folder)
                evil = make(Payload(str(mark)))
                for file in [p for p in folder.rglob("*") if p.is_file()]:
                    file.write_bytes(evil)
                    for suffix in (".pkl", ".pt", ".npz"):
                        file.with_suffix(suffix).write_bytes(evil)
                faults = again(kind, folder, truth, must_say="", keep=False)
                if mark.exists():
                    faults.append(("executed", name))
                tally.add([(k, f"{name}: {text}") for k, text in faults])
    tally.show()


def starved(kind, folder, limit):
    """A call whose disk is full or read-only: what it says."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    estimator, rows = work(kind, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            estimator.fit(rows)
        except Exception as error:
            return {"failed": type(error).__name__, "text": str(error), "left": what_is_left()}
    return {"numbers": numbers(estimator), "said": [str(w.message) for w in said], "left": what_is_left()}


def disk(report, truths):
    with tempfile.TemporaryDirectory() as root:
        place = Path(root) / "small"
        place.mkdir()
        mounted = _mount(["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)])
        report.note(
            "disk: " + ("a tmpfs of 200 kB" if mounted else "no tmpfs may be mounted: RLIMIT_FSIZE instead")
        )
        tally = Tally(report, "full and read-only disks")
        try:
            for kind in ("short search", "epochs"):
                for how in ("full", "nearly full", "read-only") if mounted else ("full", "nearly full"):
                    folder, limit = place / f"{kind} {how}", 0
                    folder.mkdir()
                    ballast = place / "ballast"
                    if mounted and how != "read-only":
                        _fill(ballast, spare=0 if how == "full" else 8192)
                    elif mounted:
                        _mount(["-o", "remount,ro", str(place)])
                    else:
                        limit = 64 if how == "full" else 700
                    found = in_child(starved, kind, folder, limit)
                    if mounted and how == "read-only":
                        _mount(["-o", "remount,rw", str(place)])
                    ballast.unlink(missing_ok=True)
                    faults = _plain(found, truths[kind], folder)
                    faults += again(
                        kind, folder, truths[kind], keep=False
                    )  # nothing half-written is taken up
                    names = {p.name for p in folder.rglob("*")}
                    expected = set(content(truths[kind]["folder"]))
                    if kind != "epochs" and names - expected:
                        faults.append(("raw", f"leftovers {sorted(names - expected)[:3]}"))
                    tally.add([(k, f"{kind}, {how}: {text}") for k, text in faults])
                    shutil.rmtree(folder)
        finally:
            if mounted:
                subprocess.run(["umount", str(place)], check=False)
        tally.show()


def _plain(found, truth, folder):
    """An error has to name the place; without one the numbers have to be right."""
    if found is None or "error" in found:
        return [("raw", str(found))]
    faults = [("raw", f"left behind: {left}") for left in found["left"]]
    if "failed" in found:
        ours = "checkpoint" in found["text"] and not found["text"].startswith("[Errno")
        return faults if ours else [*faults, ("raw", f"{found['failed']}: {found['text']}")]
    return faults if same(found["numbers"], truth["numbers"]) else [*faults, ("wrong", str(found["numbers"]))]


def _mount(arguments):
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _fill(file, spare):
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            stream.truncate(max(0, stream.tell() - spare))


def together(report, truths, repeats):
    tally = Tally(report, "two and three searches in one folder")
    truth = truths["search"]
    for _ in range(repeats):
        for n in (2, 3):
            with tempfile.TemporaryDirectory() as folder:
                children = [Child(undisturbed, "search", folder) for i in range(n)]
                faults = []
                for found in [child.result() for child in children]:
                    if found is None or "error" in found:
                        faults.append(("raw", str(found)))
                    elif not same(found["numbers"], truth["numbers"]):
                        faults.append(("wrong", str(found["numbers"])))
                tally.add(faults + again("search", folder, truth, untouched=truth["finished"]))
    tally.show()


def by_threads(n_calls):
    """Faults of fits and scores that 8 threads make."""
    models = {
        "PPCA": (lambda: BayesMPT(PPCA(1)), (X,)),
        "by masks": (
            lambda: BayesMPT(
                FactorAnalysis(1), masks=UniformSize(2), training=Steps(max_iter=8), random_state=0
            ),
            (X,),
        ),
        "mixture": (lambda: BayesMPT(GaussianMixture(2), random_state=0), (X,)),
        "Gaussian process": (
            lambda: BayesMPT(GaussianProcess(), training=Ascent(max_iter=5)),
            (TIMES, HEIGHTS),
        ),
        "VAE": (
            lambda: BayesMPT(VAE(latent_dim=1, hidden=(3,)), training=Epochs(max_epochs=1), random_state=0),
            (CODES,),
        ),
    }
    fitted = {name: make().fit(*data) for name, (make, data) in models.items()}
    truth = {name: fitted[name].score_samples(*models[name][1]) for name in models}

    def call(i):
        name = list(models)[i % len(models)]
        make, data = models[name]
        try:
            model = make().fit(*data) if i % 2 else fitted[name]
            right = np.allclose(model.score_samples(*data), truth[name], **CLOSE)
        except BaseException as error:
            return [("raw", f"{name}: {type(error).__name__}: {error}"[:200])]
        return [] if right else [("wrong", name)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(n_calls)))
    return [*found, [("raw", f"left behind: {left}") for left in what_is_left()]]


def threads(report, n_calls):
    tally = Tally(report, "fits and scores of 8 threads")
    found = in_child(by_threads, n_calls)
    for faults in found if isinstance(found, list) else [[("raw", str(found))]]:
        tally.add(list(map(tuple, faults)))
    tally.tries = n_calls
    tally.show()


def warm_up():
    """Import here what libraries import late: forked processes would do so each, and a press leaves half a module."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a_short_search(folder).fit(X)
        a_fit().set_params(training__max_iter=5).fit(X)
        epochs(folder).set_params(training__max_epochs=1).fit(CODES)


def main(report: Report, args):
    chance = np.random.default_rng(args.seed)
    quick = int(args.quick)
    warm_up()
    with tempfile.TemporaryDirectory() as root:
        truths = Truths(Path(root))
        for part in args.part or PARTS:
            begun = time.monotonic()
            if part in ("presses", "kills"):
                tries = {k: v[quick] for k, v in (PRESSES if part == "presses" else KILLS).items()}
                signals(report, truths, tries, signal.SIGINT if part == "presses" else signal.SIGKILL, chance)
            elif part == "flips":
                flips(report, truths, FLIPS[quick], chance)
            elif part == "damage":
                damage(report, truths, args.quick, chance)
            elif part == "malicious":
                malicious(report, truths)
            elif part == "disk":
                disk(report, truths)
            elif part == "together":
                together(report, truths, 1 if args.quick else 5)
            else:
                threads(report, CALLS[quick])
            print(f"   {part}: {time.monotonic() - begun:.0f} s", flush=True)
    for column in ("finished lost", "unfinished used", "raw errors", "executed", "wrong numbers"):
        total = sum(row[column] for row in report.rows)
        report.target(
            f"{column}: 0", total == 0, f"{total} of {sum(row['tries'] for row in report.rows)} tries"
        )


def _arguments(parser):
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, bytes and files")


if __name__ == "__main__":
    if not hasattr(os, "fork"):
        sys.exit("needs os.fork")
    run(main, __file__, __doc__, _arguments)
