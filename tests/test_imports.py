"""What an import costs: the heavy libraries come with what needs them."""

import subprocess
import sys

import pytest

import bayes_mpt
import bayes_mpt.models

FIT = """
import sys
from sklearn.datasets import load_iris
import bayes_mpt
from bayes_mpt import BayesMPT, MarginalLikelihoodSearch
BayesMPT(bayes_mpt.models.PPCA(2)).fit(load_iris().data).score(load_iris().data)
heavy = "gpytorch linear_operator matplotlib transformers scipy.signal sklearn.cluster sklearn.gaussian_process"
print([name for name in heavy.split() if name in sys.modules])
"""


@pytest.mark.slow
def test_a_fit_of_ppca_loads_no_heavy_library():
    # pandas and scipy.stats come with scikit-learn
    done = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [bayes_mpt, bayes_mpt.models], ids=lambda p: p.__name__)
def test_every_public_name_is_found(package):
    for name in package.__all__:
        assert name in dir(package)
        assert getattr(package, name).__module__.startswith(package.__name__)
    with pytest.raises(AttributeError, match="has no attribute 'PCA'"):
        _ = package.PCA
