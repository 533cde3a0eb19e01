"""Log-densities of a program's tokens at given latents, its discrete latents summed out.

`factor_runs.read_factors` runs the program once for S values of the continuous latents (nodes), side by side on a plate
of their own, with the discrete ones enumerated by Pyro. What comes out answers two questions for any visible set R:

    log_joint   log p(u_s, x_R), the discrete latents summed out                     (S, N)
    predictive  log p(x_i | x_R, u_s) of every token, hidden from the others         (S, N, T)

The second comes from one backward pass: with a factor 1 + delta_i p(x_i | z) for each hidden token,
d log Z / d delta_i at zero is E[p(x_i | z) | x_R] = p(x_i | x_R). That is forward-backward for any plated graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import starmap
from typing import Any, NamedTuple

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from bayes_mpt.program.layout import from_rows, sum_by_row, to_rows
from bayes_mpt.program.log_sums import LogSums
from bayes_mpt.program.program import Observed

__all__ = ["Factors", "Question", "Tokens"]


UNDERFLOW = 1e-280

Question = Callable[[Any, torch.Size], Tensor]
"""Of a distribution, whose log-density has this shape."""


class Tokens(NamedTuple):
    """The tokens of one observed site."""

    site: Observed
    log_prob: Tensor
    """(enumerated..., S, plates..., event...)"""
    ask: Callable[[Question, int], Tensor]
    """What is said of the distribution of a token, laid out as ``log_prob``, and so many axes more."""
    ordinal: frozenset[str]
    symbols: dict[int, str]
    n_event: int
    """Axes on the right that are no plates."""

    def mean(self) -> Tensor:
        """What a hidden token is filled in with, as ``log_prob`` is laid out: the mean, or the likeliest category."""
        value = self.log_prob.new_tensor(float("nan"))
        if not self.site.n_joint:
            with suppress(NotImplementedError):
                value = self.ask(_likeliest if self.codes else _mean, 0)
        return value.expand(self.log_prob.shape)

    @property
    def codes(self) -> bool:
        """Whether tokens are categories."""
        return self.site.kind == "Categorical"


class Factors(NamedTuple):
    """One run's log-densities."""

    tokens: tuple[Tokens, ...]
    prior: Tensor | None
    """log p(u_s), (S, N), where nothing is summed."""
    latents: tuple[tuple[frozenset[str], Tensor], ...]
    """Packed log-densities of the latent sites with their plates, where discrete ones are summed out."""
    own: tuple[str, ...]
    """The symbol that each of these sites is enumerated along; empty where it is not."""
    summed: frozenset[str]
    """Symbols of the enumerated sites; empty where nothing is summed."""
    kept: str
    """Symbols of nodes and rows, those that there are."""
    sizes: dict[str, int]
    n_nodes: int
    n_rows: int
    scale: float
    """Plate or `poutine.scale` factor of the run."""
    value: Tensor
    """(N, T) tokens of the run."""
    together: tuple[tuple[str, frozenset[str]], ...] = ()
    """Symbols of the sites whose values are enumerated for all entries of these plates together."""

    @property
    def n_tokens(self) -> int:
        """T."""
        return sum(t.site.n_tokens for t in self.tokens)

    # ------------------------------------------------------------------------------------------------ the questions

    def log_joint(self, visible: Tensor) -> Tensor:
        """log p(u_s, x_R): visible (N, T) bool, or (T,) of all rows -> (S, N)."""
        if self.prior is not None:
            total = self.prior
            for t, log_prob in zip(self.tokens, self._shown(visible), strict=True):
                n_axes = len(t.site.shape) - t.site.n_joint
                axis = None if t.site.row_axis is None else t.site.row_axis - n_axes
                total = total + sum_by_row(log_prob, axis, self.n_nodes)
            return total
        return self._contract(self._shown(visible))

    def _shown(self, visible: Tensor) -> list[Tensor]:
        """Log-densities of each site's tokens, 0 where one is hidden."""
        if bool(visible.all()):
            return [t.log_prob for t in self.tokens]
        parts = self._layout(visible.expand(self.n_rows, self.n_tokens))
        return [torch.where(m, t.log_prob, 0.0) for t, m in parts]

    def log_prior(self) -> Tensor:
        """log p(u_s), discrete latents summed out: (S, N)."""
        if self.prior is not None:
            return self.prior
        others = [term for term, symbol in zip(self.latents, self.own, strict=True) if not symbol]
        if others and not any(self.summed & set(t._pyro_dims) for _, t in others):  # type: ignore[attr-defined]
            return self._finish(others)  # the values of each discrete latent add up to one
        device = self.tokens[0].log_prob.device
        return self.log_joint(torch.zeros(self.n_rows, self.n_tokens, dtype=torch.bool, device=device))

    def predictive(self, visible: Tensor, create_graph: bool = False) -> Tensor:
        """log p(x_i | x_R, u_s) of each token that is not visible: (N, T) bool -> (S, N, T)."""
        if not self.summed:
            return self._plain()
        ceilings = [t.log_prob.detach().flatten(0, self._left(t) - 1).amax(0) if self._left(t) else t.log_prob.detach()
                    for t in self.tokens]  # fmt: skip
        weights = [(t.log_prob - c).exp() for t, c in zip(self.tokens, ceilings, strict=True)]
        shares = self._expectations(visible, weights, create_graph)
        out = torch.cat(
            [
                share.clamp(min=torch.finfo(share.dtype).tiny).log() + self._by_row(t, c)
                for t, share, c in zip(self.tokens, shares, ceilings, strict=True)
            ],
            -1,
        )
        # A token so far from what is visible that its share underflows: by the difference itself.
        lost = torch.cat([s.detach() for s in shares], -1) < UNDERFLOW
        for token in (lost & ~visible).flatten(0, 1).any(0).nonzero()[:, 0]:
            more = visible.clone()
            more[:, token] = True
            step = self.log_joint(more) - self.log_joint(visible)
            out = torch.cat(
                [
                    out[..., :token],
                    torch.where(lost[..., token], step, out[..., token])[..., None],
                    out[..., token + 1 :],
                ],
                -1,
            )
        return out

    def means(self, visible: Tensor) -> Tensor:
        """E[x_i | x_R, u_s]: (N, T) bool -> (S, N, T)."""
        if not self.summed:
            return torch.cat([self._by_row(t, t.mean()) for t in self.tokens], -1)
        means = [t.mean() for t in self.tokens]
        found = self._expectations(visible, means, False)
        return torch.cat(
            [
                torch.where(
                    self._by_row(
                        t,
                        m.flatten(0, max(0, self._left(t) - 1)).isnan().any(0)
                        if self._left(t)
                        else m.isnan(),
                    ),
                    torch.nan,
                    f,
                )
                for t, m, f in zip(self.tokens, means, found, strict=True)
            ],
            -1,
        )

    def draw(self) -> Tensor | None:
        """A draw of every token at every node, (S, N, T); None where latents are summed out or tokens are vectors."""
        if self.summed or any(t.site.n_joint for t in self.tokens):
            return None
        drawn = [self._by_row(t, t.ask(_draw, 0)) for t in self.tokens]
        return torch.cat([d.to(self.tokens[0].log_prob) for d in drawn], -1)

    def levels(self, visible: Tensor) -> Tensor | None:
        """Probabilities of the categories of categorical tokens given x_R and u_s, 0 for others: (S, N, T, L)."""
        probs = [t.ask(_probs, 1) if t.codes else None for t in self.tokens]
        n_levels = max((p.shape[-1] for p in probs if p is not None), default=0)
        if not n_levels:
            return None
        zero = [torch.zeros_like(t.log_prob) for t in self.tokens]
        out = []
        for level in range(n_levels):
            weights = [
                z if p is None or level >= p.shape[-1] else p[..., level].expand(z.shape)
                for p, z in zip(probs, zero, strict=True)
            ]
            if self.summed:
                out.append(torch.cat(self._expectations(visible, weights, False), -1))
            else:
                out.append(
                    torch.cat([self._by_row(t, w) for t, w in zip(self.tokens, weights, strict=True)], -1)
                )
        return torch.stack(out, -1)

    def responsibilities(self, visible: Tensor) -> Tensor:
        """Probabilities of the values of each discrete latent given x_R and u_s, side by side: (S, N, L).

        d log Z / d log p(z = k | parents) is the probability of k and its parents. Sites in further plates are left
        out.
        """
        out = [self.tokens[0].log_prob.new_zeros(self.n_nodes, self.n_rows, 0)]
        labels = [o for (o, _), symbol in zip(self.latents, self.own, strict=bool(self.summed)) if symbol]
        if all(self._away(o) for o in labels):
            return out[0]
        with torch.enable_grad():
            terms = [(o, self._in_each_row(o, f).requires_grad_()) for o, f in self.latents]
            bare = self._replace(latents=tuple(terms))
            total = bare.log_joint(visible).sum()
            grads = torch.autograd.grad(total, [f for _, f in terms], materialize_grads=True)
        for (ordinal, term), symbol, grad in zip(terms, self.own, grads, strict=True):
            if not symbol or self._away(ordinal):
                continue
            dims = term._pyro_dims  # type: ignore[attr-defined]  # Pyro names packed axes so
            away = [i for i, s in enumerate(dims) if s != symbol and s not in self.kept]
            grad = grad.sum(away) if away else grad
            left = [s for s in dims if s == symbol or s in self.kept]
            grad = grad.permute([left.index(s) for s in (*self.kept, symbol) if s in left])
            shape = [n if s in left else 1 for s, n in zip(self.kept, self._kept_shape(), strict=True)]
            grad = grad.reshape(*shape, -1).expand(*self._kept_shape(), -1)
            out.append(grad.reshape(self.n_nodes, self.n_rows, -1))
        return torch.cat(out, -1)

    def _away(self, ordinal: frozenset[str]) -> set[str]:
        """The plates of a site that are neither nodes nor rows."""
        return {s for s in ordinal if self.sizes[s] > 1} - set(self.kept)

    def _in_each_row(self, ordinal: frozenset[str], term: Tensor) -> Tensor:
        """A latent's packed log-density, with the nodes and rows that do not change it too, detached."""
        dims: str = term._pyro_dims  # type: ignore[attr-defined]  # Pyro names packed axes so
        more = "".join(s for s in self.kept if s in ordinal and s not in dims)
        whole = term.detach().expand(*(self.sizes[s] for s in more), *term.shape).clone()
        whole._pyro_dims = more + dims  # type: ignore[attr-defined]
        return whole

    def _kept_shape(self) -> list[int]:
        return [self.sizes[s] for s in self.kept]

    def chain(self, seen: Tensor, order: Tensor) -> Tensor:
        """log p(u_s, x_order[:t]) for t = 0..T: seen (N, T) bool, order (T,) -> (S, N, T + 1)."""
        if self.prior is not None:
            steps = torch.where(seen, self._plain(), 0.0)[..., order].cumsum(-1)
            prior = self.prior[..., None].expand(*steps.shape[:2], 1)
            return torch.cat([prior, prior + steps], -1)
        visible = torch.zeros_like(seen)
        out = [self.log_joint(visible)]
        for token in order:
            visible = visible.clone()
            visible[:, token] = seen[:, token]
            out.append(self.log_joint(visible))
        return torch.stack(out, -1)

    # -------------------------------------------------------------------------------------------------- the algebra

    def _plain(self) -> Tensor:
        """(S, N, T) where nothing is summed."""
        parts = [self._by_row(t, t.log_prob) for t in self.tokens]
        return (
            parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        )  # the largest tensor of a run: not copied

    def _left(self, t: Tokens) -> int:
        """Leading dimensions before nodes and plates: those of enumerated sites."""
        depth = -min([d for d, s in t.symbols.items() if s not in self.summed], default=0)
        return max(0, t.log_prob.ndim - t.n_event - depth)

    def _layout(self, visible: Tensor) -> list[tuple[Tokens, Tensor]]:
        """Each site's part of visible (N, T), in the layout of its value."""
        out, start = [], 0
        for t in self.tokens:
            part = visible[:, start : start + t.site.n_tokens]
            start += t.site.n_tokens
            out.append((t, self._as_value(t, part)))
        return out

    def _as_value(self, t: Tokens, part: Tensor) -> Tensor:
        """(..., N, tokens) -> (..., value's axes)."""
        shape = t.site.shape[: len(t.site.shape) - t.site.n_joint]
        return from_rows(part, shape, t.site.row_axis)

    def _by_row(self, t: Tokens, a: Tensor) -> Tensor:
        """([S], value's axes), broadcast -> (S, N, tokens)."""
        shape = list(t.site.shape[: len(t.site.shape) - t.site.n_joint])
        if t.site.row_axis is not None:
            shape[t.site.row_axis] = self.n_rows
        a = a.expand(self.n_nodes, *([1] * max(0, a.ndim - 1 - len(shape))), *shape)
        return to_rows(a.reshape(self.n_nodes, *shape), t.site.row_axis, 1)

    def _contract(self, by_site: list[Tensor]) -> Tensor:
        """Sum the enumerated latents out of all factors: token log-densities in their layout -> (S, N)."""
        terms = list(self.latents)
        for t, log_prob in zip(self.tokens, by_site, strict=True):
            total = log_prob.flatten(log_prob.ndim - t.n_event).sum(-1) if t.n_event else log_prob
            terms.append((t.ordinal, packed.pack(total, t.symbols)))
        return self._finish(terms)

    def _finish(self, terms: list[tuple[frozenset[str], Tensor]]) -> Tensor:
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for ordinal, term in starmap(self._out_of_plates, terms):
            tree.setdefault(ordinal, []).append(term)
        kept = frozenset(self.kept)
        ring = LogSums(self.sizes)
        out = contract_to_tensor(tree, set(self.summed), target_ordinal=kept, ring=ring)
        dims = out._pyro_dims
        out = out.permute(*(dims.index(s) for s in self.kept)) if self.kept else out
        shape = [self.sizes.get(s, 1) for s in self.kept]
        # axes of size one were left out
        full = (self.n_nodes, self.n_rows)
        return out.reshape(shape).reshape(full)

    def _out_of_plates(self, ordinal: frozenset[str], term: Tensor) -> tuple[frozenset[str], Tensor]:
        """A term that moves with values of all entries of a plate, multiplied over these: it is one number for each.

        Else a sum over the values would be taken in each entry by itself.
        """
        dims: str = term._pyro_dims  # type: ignore[attr-defined]  # Pyro names packed axes so
        away = (
            frozenset[str]().union(*[plates for symbol, plates in self.together if symbol in dims]) & ordinal
        )
        for plate in sorted(away):
            if plate in dims:
                term, dims = term.sum(dims.index(plate)), dims.replace(plate, "")
            else:
                term = term * self.sizes[plate]
        term._pyro_dims = dims  # type: ignore[attr-defined]
        return ordinal - away, term

    def _expectations(self, visible: Tensor, weights: list[Tensor], create_graph: bool) -> list[Tensor]:
        """E[weight_i(z) | x_R, u_s] of all tokens: positive or not, by the derivative of log Z -> (S, N, tokens)."""
        with torch.enable_grad():
            deltas = [
                t.log_prob.new_zeros(self.n_nodes, self.n_rows, t.site.n_tokens, requires_grad=True)
                for t in self.tokens
            ]
            terms = []
            for (t, m), weight, delta in zip(self._layout(visible), weights, deltas, strict=True):
                placed = self._as_value(t, delta)  # (S, value's axes)
                depth = t.log_prob.ndim - self._left(t) - (placed.ndim - 1)
                if self.n_nodes > 1 or depth > 0:
                    shape = (self.n_nodes, *([1] * max(0, depth - 1)), *placed.shape[1:])
                    placed = placed.reshape(shape)
                else:
                    placed = placed[0]
                finite = torch.where(torch.isfinite(weight), weight, 0.0)
                terms.append(torch.where(m, t.log_prob, 0.0) + torch.log1p(placed * finite))
            total = self._contract(terms).sum()
            grads = torch.autograd.grad(total, deltas, create_graph=create_graph, materialize_grads=True)
        return list(grads)


def _mean(fn: Any, shape: torch.Size) -> Tensor:
    return fn.mean


def _likeliest(fn: Any, shape: torch.Size) -> Tensor:
    return fn.probs.argmax(-1).to(fn.probs)


def _probs(fn: Any, shape: torch.Size) -> Tensor:
    return fn.probs


def _draw(fn: Any, shape: torch.Size) -> Tensor:
    return fn.expand(shape).sample()
