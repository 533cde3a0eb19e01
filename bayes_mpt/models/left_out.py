"""How a mixture's components share rows: by their densities, or by what these are without the row.

A component of few rows is drawn towards each of them, so that each row holds it where it is: of n rows in T columns a
row's own part of its squared distance is about T / n. EM stays in such places, of which there are many. Judged by what
a component would be without it (as k-means does in Hartigan & Wong 1979), a row is free to leave.

A row with the share r, at the squared distance d = (x - m)' S^-1 (x - m) of a component with n rows, whose covariance
is the mean over N rows (N = n, or all if it is tied), leaves behind (Sherman & Morrison 1950)

    n' = n - r,    f = 1 - (r n / n') d / N,    det S' = (N / (N - r))^T f det S,    d' = (n / n')^2 (1 - r / N) d / f

and of one variance in T columns f = 1 - (r n / n') d / (N T), det S' = ((N / (N - r)) f)^T det S; a diagonal is taken
so too. Of rows with missing cells this is close, as the others' expectations are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["Key", "LeftOut", "Shares", "plain_shares", "shares_in_place", "shares_of"]

NEGLIGIBLE = -200.0  # of the logarithm of a share
MIN_SHARE = 0.02  # of f: rows that a component hangs on alone

Key = tuple[str | int, ...]
"""Of rows that are read together."""


class Shares(Protocol):
    """How components share rows."""

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shares (..., K, n) and log-densities (..., n).

        Parameters
        ----------
        key : Key
            Of these rows.
        log_prob : Tensor of shape (..., K, n)
            log w + log p(x_o).
        square : Callable
            The squared distances (..., K, n).
        n_cells : Tensor of shape (n,)
            Observed cells.
        """


def plain_shares(
    key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
) -> tuple[Tensor, Tensor]:
    """By the densities."""
    return shares_of(log_prob)


def shares_of(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Shares (..., K, n) and log-densities (..., n) of log w + log p (..., K, n)."""
    return shares_in_place(log_prob.clone())


def shares_in_place(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """As `shares_of`, which stand where the densities stood: an E-step of many rows takes half the time."""
    top = log_prob.amax(-2, keepdim=True)
    # what underflows takes six times as long, and says as little
    share = log_prob.sub_(top).clamp_(min=NEGLIGIBLE).exp_()
    sum_ = share.sum(-2, keepdim=True)
    return share.mul_(sum_.reciprocal()), (top + sum_.log())[..., 0, :]


class LeftOut:
    """By the densities without the row, from the second time on that it is asked for the same rows.

    Parameters
    ----------
    covariance_type : {"full", "tied", "diag", "spherical"}
    counts : callable, optional
        Of rows: how often each counts, (..., 1, n) or one number, by the name under which they are read together and
        their log-densities. All once by default.
    """

    def __init__(
        self,
        covariance_type: str,
        counts: Callable[[Key, Tensor], Tensor | float] = lambda key, log_prob: 1.0,
    ):
        self.counts = counts
        self.tied = covariance_type == "tied"
        self.dense = covariance_type in ("full", "tied")
        self.before: dict[Key, Tensor] = {}
        self.count: Tensor | None = None

    def __call__(
        self, key: Key, log_prob: Tensor, square: Callable[[], Tensor], n_cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Shares`; the log-densities are those with the rows, by which places can be compared."""
        share, density = plain_shares(key, log_prob, square, n_cells)
        if self.count is not None and key in self.before:
            change = self.change(self.before[key], square(), n_cells, self.count)
            share, _ = plain_shares(key, log_prob + change, square, n_cells)
        share = share * self.counts(key, log_prob)
        self.before[key] = share
        return share, density

    def change(self, r: Tensor, square: Tensor, n_cells: Tensor, count: Tensor) -> Tensor:
        """log w' + log p' - log w - log p (..., K, n) of rows with shares r (..., K, n), counts (..., K)."""
        n = count[..., None]
        of_scale = n.sum(-2, keepdim=True) if self.tied else n
        left, rest = (n - r).clamp(min=MIN_SHARE), (of_scale - r).clamp(min=MIN_SHARE)
        n_alike = 1.0 if self.dense else n_cells
        f = (1 - r * n / left * square / (of_scale * n_alike)).clamp(min=MIN_SHARE)
        further = (n / left).square() * (rest / of_scale) * square / f
        log_det = n_cells * (of_scale / rest).log() + n_alike * f.log()
        return (left / n).log() - 0.5 * (log_det + further - square)

    def told(self, count: Tensor) -> None:
        """The rows (..., K) of which the components are made now."""
        self.count = count
