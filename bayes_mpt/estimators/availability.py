"""Which methods an estimator offers: what its program can be asked, before it is fitted what it may be."""

from __future__ import annotations

from typing import Any

from bayes_mpt.estimators.rows import takes_y
from bayes_mpt.program.offers import offered

__all__ = [
    "counts_parameters",
    "is_unfitted",
    "may_take_labels",
    "predicts",
    "predicts_vector",
    "takes_labels",
]


def is_unfitted(estimator: Any) -> bool:
    """Whether there is nothing to ask about yet."""
    return not hasattr(estimator, "fitted_")


def takes_labels(estimator: Any) -> bool:
    """Whether each row has one discrete latent, whose value is its label."""
    if is_unfitted(estimator):
        return False
    structure = estimator.fitted_.bound.structure
    return structure.one_label and estimator.fitted_.y_like is None


def may_take_labels(estimator: Any) -> bool:
    """The same; of a program that is not fitted yet whether that can be."""
    if not is_unfitted(estimator):
        return takes_labels(estimator)
    model = estimator.model
    return model is not None and offered(model, "symmetries") is None and not takes_y(model)


def predicts_y(estimator: Any) -> bool:
    """Whether there is a y to predict; of a program that is not fitted yet whether it takes one."""
    if is_unfitted(estimator):
        return estimator.model is not None and takes_y(estimator.model)
    return estimator.fitted_.y_like is not None


def predicts_vector(estimator: Any) -> bool:
    """Whether there are new observations of a Gaussian vector to draw."""
    return predicts_y(estimator) and (
        is_unfitted(estimator) or estimator.fitted_.bound.structure.gaussian_vector
    )


def counts_parameters(estimator: Any) -> bool:
    """Whether rows are independent and something was estimated by the likelihood."""
    if is_unfitted(estimator):
        return True
    found = estimator.fitted_.bound
    return bool(found.structure.by_row and found.structure.parameters) and not (
        found.structure.gaussian_vector or found.structure.takes_visible
    )


def predicts(estimator: Any) -> bool:
    """Whether there are labels or a y to predict."""
    return takes_labels(estimator) or predicts_y(estimator)
