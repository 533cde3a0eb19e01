"""Maximise a score over the parameters of a Pyro program.

`Ascent`, `Steps` and `Epochs` say how: they are what `bayes_mpt.BayesMPT` takes as ``training`` (``options``). What
is maximised is a `Problem` (``problem``).

The first way that fits: `maximize_profile` (``closed_form``) solves for mean, loadings and noise where the program
leaves them free, by EM where cells are missing, under a ``noise_prior`` or none; `maximize_lbfgs` (``lbfgs``) runs
L-BFGS on the exact score; `train_on_masks` (``adam``) runs Adam on sampled masks. They work on the parameters that
stand in Pyro's parameter store at the time, in ``units`` found from the program itself, so that the path is the same
whatever the columns' scales. `train_by_epochs` (``epochs``) is for networks, in the parameters' own units:
minibatches, held-out rows, checkpoints. `noise_at_zero` and `collapsed` (``vanishing``) look at where a training has
ended.

No trainer asks which way scores or knows an estimator: a way that is trained better gives another schedule.
"""

from bayes_mpt.training.adam import total_on_masks, train_on_masks
from bayes_mpt.training.closed_form import maximize_profile
from bayes_mpt.training.epochs import train_by_epochs
from bayes_mpt.training.lbfgs import maximize_lbfgs
from bayes_mpt.training.noise_prior import NoisePrior
from bayes_mpt.training.options import Ascent, Epochs, Steps, Training
from bayes_mpt.training.problem import Fit, Problem, Report, check_start, impossible
from bayes_mpt.training.vanishing import collapsed, noise_at_zero

__all__ = [
    "Ascent",
    "Epochs",
    "Fit",
    "NoisePrior",
    "Problem",
    "Report",
    "Steps",
    "Training",
    "check_start",
    "collapsed",
    "impossible",
    "maximize_lbfgs",
    "maximize_profile",
    "noise_at_zero",
    "total_on_masks",
    "train_by_epochs",
    "train_on_masks",
]
