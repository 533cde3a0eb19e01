"""Files of a search and of a training: known by the value of what was asked, whole or set aside, never executed."""

from __future__ import annotations

import enum
import errno
import functools
import hashlib
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import PeriodicKernel, RBFKernel, ScaleKernel
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import bayes_mpt
from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, VAE, FactorAnalysis, GaussianMixture, GaussianProcess, Potts
from bayes_mpt.predictors import Importance
from bayes_mpt.runtime.checkpoints import CheckpointError, DamagedError, decode, encode, read, write
from bayes_mpt.runtime.digests import CannotDigest, digest_of
from bayes_mpt.training import Ascent, Epochs, Steps

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 4))
HOLES = np.where(RNG.uniform(size=X.shape) < 0.1, np.nan, X)
CODES = (X > 0).astype(float)
FRAME = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "c": ["u", "v"] * 12})
TIMES = np.linspace(0, 1, 12)[:, None]
HEIGHTS = np.sin(5 * TIMES[:, 0]) + 0.1 * RNG.normal(size=12)
TOL = {"training": [Ascent(tol=1e-9), Ascent(tol=1e-8)]}
PAIR = {"model__n_components": [0, 1]}


# ----------------------------------------------------------------------------------------------------- what is asked


def program(x):
    loc = pyro.param("loc", lambda: x.mean(0))
    scale = pyro.param("scale", lambda: x.std(0), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def shifted(by):
    """Over a tensor, a number or a set."""

    def inner(x):
        loc = pyro.param("loc", lambda: x.mean(0))
        move = by if isinstance(by, torch.Tensor | float) else float(len(by))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc + move, 1.0).to_event(1), obs=x)

    return inner


def heavy(x):
    """Latents that only draws integrate."""
    scale = pyro.param("scale", lambda: x.std(), constraint=dist.constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), scale).to_event(1), obs=x)


class Net(pyro.nn.PyroModule):
    """With a buffer that every run moves, and one that says where the rows lie."""

    def __init__(self, at=0.0):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.register_buffer("at", torch.tensor(at, dtype=torch.float64))
        self.register_buffer("runs", torch.tensor(0))

    def forward(self, x):
        self.runs += 1
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(self.loc + self.at, 1.0).to_event(1), obs=x)


class FirstNumbers(TransformerMixin, BaseEstimator):
    """A transformer of the user's own script."""

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        return np.asarray(X[["a", "b"]], float)

    def get_feature_names_out(self, names=None):
        return np.array(["a", "b"], object)


KINDS = {  # estimator, grid, data, settings of the search
    "PPCA": (BayesMPT(PPCA()), PAIR, (X,), {}),
    "far from zero": (BayesMPT(PPCA(1)), TOL, (X + 1e6,), {"evidence": "laplace"}),
    "dimension by itself": (BayesMPT(), TOL, (X,), {}),
    "factors, with holes": (BayesMPT(FactorAnalysis(1)), TOL, (HOLES,), {"random_state": 0}),
    "mixture": (BayesMPT(GaussianMixture(1)), {"model__n_components": [1, 2]}, (X,), {"random_state": 0}),
    "Gaussian process": (
        BayesMPT(GaussianProcess(), random_state=0),
        {"model__kernel": [ScaleKernel(RBFKernel()), ScaleKernel(PeriodicKernel())]},
        (TIMES, HEIGHTS),
        {"evidence": "integrated"},
    ),
    "VAE": (
        BayesMPT(VAE(1, hidden=(3,)), training=Epochs(max_epochs=2)),
        {"training__patience": [5]},
        (CODES,),
        {"random_state": 0},
    ),
    "masked network": (
        BayesMPT(Potts(), training=Steps(max_iter=5)),
        {"training__tol": [1e-2]},
        (CODES,),
        {"random_state": 0},
    ),
    "program": (BayesMPT(program), TOL, (X,), {}),
    "lambda": (BayesMPT(lambda x: program(x)), TOL, (X,), {}),
    "closure over a set": (BayesMPT(shifted({"aa", "bb", "cc"})), TOL, (X,), {}),
    "closure over a tensor": (BayesMPT(shifted(torch.ones(4, dtype=torch.float64))), TOL, (X,), {}),
    "PyroModule": (BayesMPT(Net(1.0)), TOL, (X,), {}),
    "draws without a seed": (
        BayesMPT(heavy, predictor=Importance(4), training=Steps(max_iter=5)),
        {"training__tol": [1e-2]},
        (X,),
        {"random_state": None},
    ),
    "Pipeline": (
        Pipeline([("numbers", FirstNumbers()), ("scaled", StandardScaler()), ("m", BayesMPT(PPCA()))]),
        {"m__model__n_components": [0, 1]},
        (FRAME,),
        {"evidence": HeldOut(2)},
    ),
}


def searched(folder, kind="PPCA", **settings):
    estimator, grid, data, own = KINDS[kind]
    settings = {"evidence": "train", "random_state": 0} | own | settings
    with warnings.catch_warnings():
        for said in ("the training stopped", "the importance weights", "the estimate of", "nodes that"):
            warnings.filterwarnings("ignore", said)
        return MarginalLikelihoodSearch(estimator, grid, checkpoint_dir=folder, **settings).fit(*data)


@pytest.fixture
def no_fits(monkeypatch):
    """Whoever fits from here on fails."""

    def begin():
        def refuse(self, X, y=None):
            raise AssertionError("fitted again")

        monkeypatch.setattr(BayesMPT, "fit", refuse)

    return begin


# ------------------------------------------------------------------------------------------------------ the digest


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Point:
    x: float
    y: float = 0.0


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


FACTOR = 2.0


def by_global(x):
    return FACTOR * x


def calls_global(x):
    return by_global(x)


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


def _default(x, k=1.0):
    return x * k


def _keyword(x, *, k=1.0):
    return x * k


def _class_with(value):
    class Own:
        def get(self):
            return value

    return Own


def _masked(hidden):
    return np.ma.MaskedArray([hidden, 2.0], mask=[True, False])


def _used(kernel):
    with torch.no_grad():
        kernel(torch.ones(2, 1)).to_dense()
    return kernel


FORTRAN = np.asfortranarray(X)
EQUAL = {  # two values that are one
    "sets": ({"a", "b", "c"}, {"c", "b", "a"}),
    "dicts": ({"a": 1, 2: "b"}, {2: "b", "a": 1}),
    "layouts": (X, FORTRAN),
    "strides": (torch.arange(6.0)[::2].clone(), torch.arange(6.0)[::2]),
    "stretched": (torch.ones(3), torch.ones(1).expand(3)),
    "objects shared or not": ([X, X], [X, X.copy()]),
    "kernels": (ScaleKernel(RBFKernel()), ScaleKernel(RBFKernel())),
    "kernels, one of which was used": (RBFKernel(), _used(RBFKernel())),
    "clones": (BayesMPT(Net()), clone(BayesMPT(Net()))),
    "closures": (shifted({"u", "v"}), shifted({"v", "u"})),
    "hidden cells": (_masked(1.0), _masked(np.nan)),
    "classes": (_class_with(1), _class_with(1)),
    "streams": (np.random.RandomState(3), np.random.RandomState(3)),
    "sparse": (scipy.sparse.csr_matrix(X), scipy.sparse.csr_matrix(FORTRAN)),
}
APART = {  # two values that are not
    "swapped rows": (X, X[::-1].copy()),
    "two duplicate rows for others": (X[[0, 0, 1, 1]], X[[0, 1, 1, 0]]),
    "a bit": (X, np.where(X == X[3, 2], np.nextafter(X, 9), X)),
    "precision": (X, X.astype(np.float32)),
    "shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "signs of zero": (0.0, -0.0),
    "whole and real": (1, 1.0),
    "true and one": (True, 1),
    "text and bytes": ("a", b"a"),
    "list and tuple": ([1], (1,)),
    "borders": (["ab", "c"], ["a", "bc"]),
    "nested": ([[1], 2], [1, [2]]),
    "names of columns": (FRAME, FRAME.rename(columns={"a": "z"})),
    "order of columns": (FRAME, FRAME[["b", "a", "c"]]),
    "cells of text": (FRAME, FRAME.assign(c="u")),
    "masks": (_masked(1.0), np.ma.MaskedArray([1.0, 2.0])),
    "sets": ({"a", "b"}, {"a", "c"}),
    "closures over sets": (shifted({"a"}), shifted({"a", "b"})),
    "closures over tensors": (shifted(torch.ones(4)), shifted(torch.zeros(4))),
    "defaults": (_default, functools.update_wrapper(lambda x, k=2.0: x * k, _default)),
    "partials": (functools.partial(_default, k=1.0), functools.partial(_default, k=2.0)),
    "lambdas": (lambda x: x + 1, lambda x: x + 2),
    "operations": (lambda x: x + 1, lambda x: x - 1),
    "names": (lambda x: x.sum(), lambda x: x.mean()),
    "inner lambdas": (lambda x: (lambda u: u + 1)(x), lambda x: (lambda u: u + 2)(x)),
    "kernels": (ScaleKernel(RBFKernel()), ScaleKernel(PeriodicKernel())),
    "constraints": (RBFKernel(), RBFKernel(lengthscale_constraint=GreaterThan(0.1))),
    "active columns": (RBFKernel(active_dims=[0]), RBFKernel(active_dims=[1])),
    "parameters of networks": (Net(), Net(2.0)),
    "order of layers": (
        torch.nn.Sequential(torch.nn.Tanh(), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()),
    ),
    "estimators": (BayesMPT(PPCA(1)), BayesMPT(PPCA(2))),
    "members": (Colour.RED, Colour.BLUE),
    "dataclasses": (Point(1.0), Point(2.0)),
    "slots": (Slotted(1), Slotted(2)),
    "classes": (_class_with(1), _class_with(2)),
    "streams": (np.random.RandomState(3), np.random.RandomState(4)),
    "generators": (np.random.default_rng(3), np.random.default_rng(4)),
    "slices": (slice(1), slice(2)),
    "paths": (Path("a"), Path("b")),
    "dtypes": (torch.float32, torch.float64),
    "distributions": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)),
    "limits": (dist.constraints.greater_than(0.0), dist.constraints.greater_than(1.0)),
    "sparse": (scipy.sparse.csr_matrix(X), scipy.sparse.csr_matrix(2 * X)),
    "functions of packages": (np.exp, np.log),
    "methods": ([1].count, [2].count),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_values_have_one_digest(name):
    one, two = EQUAL[name]
    assert digest_of(one) == digest_of(two)


@pytest.mark.parametrize("name", APART)
def test_other_values_have_other_digests(name):
    one, two = APART[name]
    assert digest_of(one) != digest_of(two)


def test_a_global_counts_by_value(monkeypatch):
    before = digest_of(calls_global)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert digest_of(calls_global) != before  # also through a function that is called
    assert digest_of(even) == digest_of(even)  # cycles end
    loop = [1]
    loop.append(loop)
    assert digest_of(loop) == digest_of(loop)


def test_keyword_defaults_count(monkeypatch):
    before = digest_of(_keyword)
    monkeypatch.setattr(_keyword, "__kwdefaults__", {"k": 2.0})
    assert digest_of(_keyword) != before


def test_a_module_of_ones_own_counts_by_its_text(tmp_path, monkeypatch):
    (tmp_path / "own_helper.py").write_text("def scale(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_helper

    before = digest_of(own_helper)
    (tmp_path / "own_helper.py").write_text("def scale(x):\n    return 3 * x\n")
    assert digest_of(own_helper) != before


def test_what_has_no_value_is_named():
    lock = threading.Lock()

    def guarded(x):
        with lock:
            program(x)

    with pytest.raises(CannotDigest, match=r"model\.lock \(a _thread\.lock\)"):
        digest_of(BayesMPT(guarded))
    with pytest.raises(CannotDigest, match="generator"):
        digest_of(PPCA(i for i in range(3)))


SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pyro, pyro.distributions as dist, torch
from gpytorch.kernels import PeriodicKernel, RBFKernel, ScaleKernel
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.pipeline import Pipeline
from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA, GaussianProcess
from bayes_mpt.training import Ascent

X = np.random.default_rng(0).normal(size=(20, 3))
WORDS = {"one", "two", "three", "four"}
shift = torch.ones(3, dtype=torch.float64)
inner, count = pyro.sample, [0]

def counting(*args, **kwargs):
    count[0] += 1
    return inner(*args, **kwargs)

def over(words):
    def program(x):
        loc = pyro.param("loc", lambda: x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc + shift * len(words | WORDS), 1.0).to_event(1), obs=x)
    return program

class Net(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

class Half(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        return self
    def transform(self, X):
        return np.asarray(X[["a", "b"]]) / 2
    def __sklearn_is_fitted__(self):
        return True

frame = pd.DataFrame(X, columns=["a", "b", "c"])
kernels = {"model__kernel": [ScaleKernel(RBFKernel()), ScaleKernel(PeriodicKernel())]}
pyro.sample = counting
for estimator, grid, data in [
    (BayesMPT(over({"u", "v", "w"})), {"training": [Ascent(tol=1e-9)]}, (X,)),
    (BayesMPT(lambda x: over(WORDS)(x)), {"training": [Ascent(tol=1e-9)]}, (X,)),
    (BayesMPT(Net()), {"training": [Ascent(tol=1e-9)]}, (X,)),
    (Pipeline([("half", Half()), ("m", BayesMPT(PPCA(1)))]), {"m__training": [Ascent(tol=1e-9)]}, (frame,)),
    (BayesMPT(GaussianProcess()), kernels, (X[:8, :1], X[:8, 1])),
]:
    s = MarginalLikelihoodSearch(estimator, grid, evidence="train", random_state=0, checkpoint_dir=sys.argv[1])
    print(*s.fit(*data).cv_results_["lml"])
print(count[0])
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path, monkeypatch, capsys):
    """Another of its own hash seed and this one at once; then this one finds all done: it runs no program."""
    script = tmp_path / "own_script.py"
    script.write_text(SCRIPT)

    def here():
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), str(tmp_path / "runs")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.setattr(pyro, "sample", pyro.sample)  # which the script changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = here()
        found = [process.communicate()[0].splitlines(), first, here()]
    assert len(found[0]) == 6 and int(found[1][-1]) > 0
    assert found[0][:-1] == found[1][:-1] == found[2][:-1]
    assert found[2][-1] == "0"
    left = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(left) == 2 * 6 and all(name.endswith(".safetensors") for name in left)


# ------------------------------------------------------------------------------------------------------- the format

CONTENT = {
    "one": torch.tensor(1.5),
    "none": None,
    "yes": True,
    "half": torch.ones(2, 3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "strided": torch.arange(6.0, dtype=torch.float64)[::2],
    "stretched": torch.ones(1, dtype=torch.float64).expand(4),
    "mask": np.array([True, False]),
    "big": np.arange(3, dtype=">i8"),
    "list": [1, 2.5, "text é", {"a/b": torch.tensor([1], dtype=torch.uint8), "a": {"b": np.float32(2)}}],
    "edges": [np.inf, -np.inf, 0.1, -0.0, 2**70],
}


def test_content_comes_back_as_it_was(tmp_path):
    write(tmp_path / "a.safetensors", "test", CONTENT)
    found = read(tmp_path / "a.safetensors", "test")
    assert found.keys() == CONTENT.keys()
    for name, value in CONTENT.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
    assert found["list"][:3] == [1, 2.5, "text é"] and found["list"][3]["a/b"].tolist() == [1]
    assert found["list"][3]["a"]["b"] == 2.0
    assert found["edges"] == CONTENT["edges"] and str(found["edges"][3]) == "-0.0"
    assert found["yes"] is True and found["none"] is None


def test_others_can_read_the_format(tmp_path):
    st = pytest.importorskip("safetensors")
    write(tmp_path / "a.safetensors", "test", {"w": torch.arange(6.0).reshape(2, 3), "n": 3})
    with st.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("/w"), torch.arange(6.0).reshape(2, 3))
        about = file.metadata()
    assert about["format"] == "bayes_mpt 1" and json.loads(about["content"]) == {
        "w": {"tensor": "/w"},
        "n": 3,
    }
    raw = (tmp_path / "a.safetensors").read_bytes()
    blank = raw.replace(about["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == about["sha256"]


def test_every_flipped_bit_is_seen():
    raw = encode("test", {"w": torch.arange(4.0), "n": [1, "a"]})
    for at in range(len(raw)):
        broken = bytearray(raw)
        broken[at] ^= 1 << at % 8
        with pytest.raises(DamagedError):
            decode(bytes(broken), "test")


def _signed(header, data=b""):
    """A file whose checksum is right, whatever it says."""
    about = {"format": "bayes_mpt 1", "kind": "test", "sha256": "0" * 64, "content": "{}"}
    header = {"__metadata__": about, **header} if isinstance(header, dict) else header
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    whole = len(text).to_bytes(8, "little") + text + data
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


def _told(**about):
    base = {"format": "bayes_mpt 1", "kind": "test", "sha256": "0" * 64, "content": "{}"}
    return _signed({"__metadata__": base | about})


WHOLE = encode("test", {"w": torch.arange(4.0)})
DAMAGES = {
    "empty": b"",
    "one byte": b"x",
    "cut": WHOLE[:-1],
    "cut in the header": WHOLE[:40],
    "longer": WHOLE + b"\0",
    "twice": WHOLE + WHOLE,
    "zeros": bytes(len(WHOLE)),
    "text": b"hello world, this is no such file",
    "pickle": pickle.dumps({"a": 1}),
    "a length beyond all": b"\xff" * 8 + b"{" + bytes(100),
    "no JSON": _signed(b"{" + b"nonsense" * 20),
    "deep JSON": _signed(b'{"a":' + b"[" * 100000),
    "no metadata": _signed(json.dumps({"a": 1}).encode()),
    "another version": _told(format="bayes_mpt 0"),
    "a later version": _told(format="bayes_mpt 2"),
    "another kind": _told(kind="other"),
    "no checksum": _told(sha256=None),
    "a number for content": _told(content=3),
    "content that is a list": _told(content="[]"),
    "content of no JSON": _told(content="{"),
    "deep content": _told(content="[" * 100000),
    "a tensor that is not there": _told(content='{"a": {"tensor": "b"}}'),
    "a tensor beyond the end": _signed(
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"
    ),
    "a tensor of other size": _signed({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "negative sizes": _signed({"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
    "huge sizes": _signed({"w": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 4]}}, b"1234"),
    "an unknown dtype": _signed({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_set_aside(name, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(DAMAGES[name])
    with pytest.warns(UserWarning, match=r"a\.safetensors is of no use.*a\.safetensors\.aside") as said:
        assert read(file, "test") is None
    assert len(said) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors.aside"]
    assert read(file, "test") is None  # without another word


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(make, tmp_path):
    make(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="it is no file"):
        assert read(tmp_path / "a.safetensors", "test") is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(step, error, tmp_path, monkeypatch):
    write(tmp_path / "a.safetensors", "test", {"n": 1})

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(wanted) as said:
        write(tmp_path / "a.safetensors", "test", {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert read(tmp_path / "a.safetensors", "test") == {"n": 1}
    if wanted is CheckpointError:
        assert "No space left" in str(said.value) and str(tmp_path) in str(said.value)
        assert str(pickle.loads(pickle.dumps(said.value))) == str(said.value)  # out of a worker


def test_only_numbers_text_and_tensors_are_written(tmp_path):
    for value in (object(), {1: 2}, np.array([object()]), 1j, torch.ones(2).to_sparse()):
        with pytest.raises(TypeError, match="a file does not hold"):
            write(tmp_path / "a.safetensors", "test", {"value": value})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- the search


SLOW = ("Gaussian process", "VAE", "draws without a seed")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_what_is_taken_up_is_what_was_finished(kind, tmp_path, no_fits):
    """To the bit: the table, the scores of the winner, its latents and all that it says of its training."""
    first = searched(tmp_path, kind)
    _, _, data, _ = KINDS[kind]
    want = first.best_estimator_
    asked = {"score_samples": data, "transform": data[:1], "predict": data[:1], "sample": (2,)}
    answers = {}
    for name, args in asked.items():
        try:
            answers[name] = getattr(want, name)(*args)
        except (ValueError, AttributeError):
            continue
    assert "score_samples" in answers
    no_fits()
    again = searched(tmp_path, kind)
    pd.testing.assert_frame_equal(again.comparison_, first.comparison_, check_exact=True)
    for key, value in first.cv_results_.items():
        if not key.startswith("param"):
            np.testing.assert_array_equal(again.cv_results_[key], value)
    assert again.evidence_reason_ == first.evidence_reason_
    got = again.best_estimator_
    for name, answer in answers.items():
        np.testing.assert_array_equal(getattr(got, name)(*asked[name]), answer)
    one, two = (e[-1] if isinstance(e, Pipeline) else e for e in (want, got))
    assert vars(one).keys() == vars(two).keys()
    for name in ("log_marginal_likelihood_", "history_", "n_iter_", "converged_", "fit_method_", "at_map_"):
        assert getattr(one, name) == getattr(two, name)
    for name, value in one.params_.items():
        np.testing.assert_array_equal(two.params_[name], value)
    np.testing.assert_array_equal(again.n_features_in_, first.n_features_in_)
    assert hasattr(again, "feature_names_in_") == hasattr(first, "feature_names_in_")


def test_buffers_of_networks_come_back(tmp_path, no_fits):
    estimator, grid, data, _ = KINDS["PyroModule"]
    first = MarginalLikelihoodSearch(estimator, grid, evidence="train", checkpoint_dir=tmp_path).fit(*data)
    runs = int(first.best_estimator_.fitted_model_.runs)
    no_fits()
    again = MarginalLikelihoodSearch(estimator, grid, evidence="train", checkpoint_dir=tmp_path).fit(*data)
    found = again.best_estimator_.fitted_model_
    assert 0 < int(found.runs) <= runs and float(found.at) == 1.0


def test_folds_go_on_from_a_stored_fit(tmp_path):
    """The fits are there, the folds are not: these know from them what the program is made of."""
    want = searched(None, evidence=HeldOut(cv=2))
    searched(tmp_path, evidence=HeldOut(cv=2))
    for file in tmp_path.glob("heldout-*"):
        file.unlink()
    got = searched(tmp_path, evidence=HeldOut(cv=2))
    pd.testing.assert_frame_equal(got.comparison_, want.comparison_, check_exact=True)


def test_a_search_that_was_taken_up_can_be_pickled(tmp_path):
    first = searched(tmp_path)
    copy = pickle.loads(pickle.dumps(searched(tmp_path)))
    np.testing.assert_array_equal(copy.score_samples(X), first.score_samples(X))
    assert copy._kept is None


def test_rows_that_change_under_a_search(tmp_path):
    """The winner is made when it is asked for, on the rows that were ranked."""
    first = searched(tmp_path)
    rows = X.copy()
    again = MarginalLikelihoodSearch(
        BayesMPT(PPCA()), PAIR, evidence="train", random_state=0, checkpoint_dir=tmp_path
    )
    again.fit(rows)
    rows[0] += 1.0
    assert again.n_features_in_ == X.shape[1]
    np.testing.assert_array_equal(again.score_samples(X), first.score_samples(X))


def test_a_log_tells_what_was_taken_up(tmp_path, caplog):
    with caplog.at_level("INFO", "bayes_mpt"):
        searched(tmp_path)
        assert "taken up" not in caplog.text
        searched(tmp_path)
    assert caplog.text.count("fit taken up from checkpoint_dir") == 2
    assert caplog.text.count(": taken up from checkpoint_dir, LML") == 2


def test_a_checkpoint_of_no_training_by_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Epochs.*minibatches of independent rows"):
        BayesMPT(PPCA(1), training=Epochs(checkpoint=tmp_path / "training"), random_state=0).fit(X)


def test_a_refit_that_names_no_candidate(tmp_path):
    for index in (2, -1, "a", 0.0):
        search = MarginalLikelihoodSearch(
            BayesMPT(PPCA()), PAIR, evidence="train", refit=lambda r, i=index: i
        )
        with pytest.raises(ValueError, match="refit must return the place of a candidate"):
            search.fit(X)


def test_a_stored_fit_that_does_not_lead_there_is_made_anew(tmp_path):
    """A file that is whole, and of other parameters: the score says so."""
    first = searched(tmp_path)
    for file in tmp_path.iterdir():
        content = decode(file.read_bytes(), "candidate")
        content["left"]["parameters"] = {n: v + 1 for n, v in content["left"]["parameters"].items()}
        write(file, "candidate", content)
    again = searched(tmp_path)
    with pytest.warns(UserWarning, match="fitted anew"):
        got = again.score_samples(X)
    np.testing.assert_array_equal(got, first.score_samples(X))


class Payload:
    """Whoever unpickles this executes it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def _as_pickle(file, payload):
    file.write_bytes(pickle.dumps(payload))


def _as_npz(file, payload):
    with file.open("wb") as stream:
        np.savez(stream, a=np.array([payload], dtype=object))


def _as_npy(file, payload):
    with file.open("wb") as stream:
        np.save(stream, np.array([payload], dtype=object), allow_pickle=True)


def _as_torch(file, payload):
    torch.save({"a": payload}, file)


def _as_header(file, payload):
    file.write_bytes(_told(kind="candidate", content=json.dumps({"left": pickle.dumps(payload).hex()})))


@pytest.mark.parametrize("make", [_as_pickle, _as_npz, _as_npy, _as_torch, _as_header])
def test_nothing_is_executed(make, tmp_path):
    runs, marker = tmp_path / "runs", tmp_path / "executed"
    want = searched(runs, random_state=None)
    files = sorted(runs.iterdir())
    for file in files:
        make(file, Payload(marker))
    with pytest.warns(UserWarning, match="is of no use") as said:
        got = searched(runs, random_state=None)
        got.score(X)
    assert not marker.exists()
    for file in files:
        assert sum(str(file) in str(w.message) for w in said) == 1
    pd.testing.assert_frame_equal(got.comparison_, want.comparison_, rtol=1e-12)


def test_a_file_under_another_name_is_no_result(tmp_path):
    want = searched(tmp_path)
    one, two = sorted(tmp_path.glob("fit-*"))
    one.write_bytes(two.read_bytes())
    for file in tmp_path.glob("train-*"):
        file.unlink()
    with pytest.warns(UserWarning, match=one.name):
        got = searched(tmp_path)
    pd.testing.assert_frame_equal(got.comparison_, want.comparison_, check_exact=True)


def test_files_of_older_versions(tmp_path):
    for name in ("0000-fit-0123456789abcdef0123.pkl", "0001-fit-0123456789abcdef0123.pkl", "seed"):
        (tmp_path / name).write_bytes(pickle.dumps(3))
    (tmp_path / "mine.txt").write_text("not of a search")
    with pytest.warns(UserWarning, match=r"0000-fit-0123456789abcdef0123\.pkl and 2 others") as said:
        searched(tmp_path)
    assert len(said) == 1
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "seed.aside").exists()
    searched(tmp_path)


def test_what_cannot_be_told_apart_is_not_kept(tmp_path):
    lock = threading.Lock()

    def guarded(x):
        with lock:
            program(x)

    def s():
        grid = {"model": [guarded, program], **TOL}
        return MarginalLikelihoodSearch(
            BayesMPT(program), grid, evidence="train", checkpoint_dir=tmp_path
        ).fit(X)

    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"nothing of .*guarded.*model\.lock \(a _thread\.lock\)"
        ) as said:
            found = s()
        assert len(said) == 1
        assert len(list(tmp_path.glob("fit-*"))) == 2
        assert np.isfinite(found.cv_results_["lml"]).all()


def test_a_full_disk_and_a_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written into the folder"):
        searched(tmp_path / "file" / "runs")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            searched(tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())
    if os.getuid() != 0:
        (tmp_path / "runs").chmod(0o500)
        with pytest.raises(CheckpointError, match="cannot be written into the folder"):
            searched(tmp_path / "runs")


def test_leftovers_of_killed_processes_go(tmp_path):
    searched(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    from bayes_mpt.runtime.checkpoints import _part_of

    mine = _part_of(tmp_path / "fit-1.safetensors")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{gone.pid}."))
    mine.write_bytes(b"half")
    dead.write_bytes(b"half")
    searched(tmp_path)
    assert mine.exists() and not dead.exists()


KILLED = """
import os, signal, sys
import numpy as np
import bayes_mpt
from bayes_mpt import BayesMPT, HeldOut, MarginalLikelihoodSearch
from bayes_mpt.models import PPCA

folder, where, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls, real = 0, getattr(os, where)

def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

X = np.random.default_rng(5).normal(size=(40, 4))
settings = {"evidence": HeldOut(2), "random_state": 0, "checkpoint_dir": folder}
if n:
    setattr(os, where, killed)
search = MarginalLikelihoodSearch(BayesMPT(PPCA(1)), {"model__n_components": [0, 1, 2]}, **settings).fit(X)
print(search.comparison_["lml"].to_dict())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "n"), [("fsync", 5), ("replace", 4)])
def test_a_search_that_is_killed_inside_a_write_goes_on(tmp_path, where, n, monkeypatch, capsys):
    """The search that is killed has a process of its own; this one takes up what it left."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "runs"), where, str(n)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL

    def ran(folder):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / folder), where, "0"])
        exec(KILLED, {"__name__": "__main__"})
        return capsys.readouterr().out

    finished = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "runs").glob("*.safetensors")}
    assert finished
    again, undisturbed = ran("runs"), ran("others")
    assert again == undisturbed != ""
    files = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "runs").iterdir()}
    assert finished.items() <= files.items()  # not written again
    assert files.keys() == {
        f.name for f in (tmp_path / "others").iterdir()
    }  # and nothing is left lying about


def test_searches_of_a_folder_share_a_seed(tmp_path):
    one, two = (searched(tmp_path, random_state=None, evidence=HeldOut(cv=2)) for _ in "ab")
    pd.testing.assert_frame_equal(one.comparison_, two.comparison_, check_exact=True)
    (tmp_path / "seed.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"seed\.safetensors is of no use: it is empty"):
        searched(tmp_path, random_state=None, evidence=HeldOut(cv=2))


# ------------------------------------------------------------------------------------------- a training by epochs


class Learner(pyro.nn.PyroModule):
    """Trained by epochs; its starting values are nobody's business."""

    batch_size = 6

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.loc = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps += 1
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = self.loc + self.factor * torch.tanh(z)[..., None]
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def trained(file, model=None, rows=X, training=None, **settings):
    epochs = Epochs(**{"max_epochs": 4, "validation_fraction": 0.25, "checkpoint": file} | (training or {}))
    base = {"training": epochs, "random_state": 0, "predictor": Importance(2)}
    with warnings.catch_warnings():
        for said in ("the training stopped", "the importance weights", "nodes that"):
            warnings.filterwarnings("ignore", said)
        return BayesMPT(model or Learner(), **base | settings).fit(rows)


@pytest.mark.slow
def test_goes_on_to_the_bit(tmp_path):
    start = Learner()
    whole = trained(None, start)
    trained(tmp_path / "t", start, training={"max_epochs": 2})
    went_on = trained(tmp_path / "t")  # from other starting values
    assert went_on.history_ == whole.history_
    for name, value in whole.params_.items():
        np.testing.assert_array_equal(went_on.params_[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


OTHERS = {
    "model": ({"model": Learner(2.0)}, "another model"),
    "batch_size": ({"training": {"batch_size": 5}}, "batch_size 6, now 5"),
    "learning_rate": ({"training": {"learning_rate": 0.02}}, "learning_rate 0.001, now 0.02"),
    "predictor": ({"predictor": Importance(3)}, r"predictor Importance\(num_particles=2\), now"),
    "validation_fraction": (
        {"training": {"validation_fraction": 0.5}},
        "validation_fraction 0.25, now 0.5",
    ),
    "patience": ({"training": {"patience": 3}}, "patience 10, now 3"),
    "random_state": ({"random_state": 1}, "random_state 0, now 1"),
    "rows": ({"rows": X[::-1].copy()}, "other rows"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_training_is_refused_by_name(name, tmp_path):
    trained(tmp_path / "t", training={"max_epochs": 1})
    before = (tmp_path / "t").read_bytes()
    settings, said = OTHERS[name]
    with pytest.raises(ValueError, match=said):
        trained(tmp_path / "t", **settings)
    assert (tmp_path / "t").read_bytes() == before


def test_masks_are_remembered(tmp_path):
    from bayes_mpt.masks import EverySize, PermutationChain

    trained(tmp_path / "t", training={"max_epochs": 1}, masks=PermutationChain())
    with pytest.raises(ValueError, match=r"masks PermutationChain\(\), now EverySize"):
        trained(tmp_path / "t", masks=EverySize())


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    file = tmp_path_factory.mktemp("two_epochs") / "t"
    model = trained(file, training={"max_epochs": 2})
    return SimpleNamespace(model=model, content=file.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("make", ["empty", "cut", "torch", "other content"])
def test_a_damaged_checkpoint_is_trained_anew(make, two_epochs, tmp_path):
    want = two_epochs.model
    file, marker = tmp_path / "t", tmp_path / "executed"
    file.write_bytes(two_epochs.content)
    if make == "torch":
        _as_torch(file, Payload(marker))
    elif make == "other content":
        write(file, "training by epochs", {"rows": 3})
    else:
        file.write_bytes(b"" if make == "empty" else file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"t is of no use.*t\.aside") as said:
        got = trained(file, training={"max_epochs": 2})
    assert len(said) == 1 and not marker.exists()
    assert len(got.history_) == len(want.history_) == 2
    assert file.exists() and (tmp_path / "t.aside").exists()


def test_a_training_on_a_full_disk(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trained(tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_change_of_any_source_file_is_another_result(tmp_path):
    """A number of an older version is not taken up as one of this: every file of the package counts, in all folders."""
    root = Path(bayes_mpt.__file__).parent
    shutil.copytree(root, tmp_path / "bayes_mpt", ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        import sys
        from bayes_mpt.runtime import digests, versions
        print(digests.__file__, digests.digest_of(1))
        with open(sys.argv[1], "a") as source:
            source.write("# changed")
        for read in vars(versions).values():  # as of another process
            if hasattr(read, "cache_clear"):
                read.cache_clear()
        print(digests.digest_of(1))
    """
    source = tmp_path / "bayes_mpt" / "predictors" / "gaussian" / "linear.py"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    file, before, after = done.stdout.split()
    assert file.startswith(str(tmp_path))
    assert before == digest_of(1)  # of another folder, in another process
    assert after != before
