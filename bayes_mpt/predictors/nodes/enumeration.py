"""Programs whose discrete latents are summed out, alone or around linear-Gaussian maps: no error."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from bayes_mpt.predictors.gaussian.linear import LinearGaussian, LinearRows
from bayes_mpt.predictors.nodes.given import AffineBatch, Factorized
from bayes_mpt.predictors.nodes.weighted import FixedSites, NodeSource, Read, program_values
from bayes_mpt.program.affine import same_by_label
from bayes_mpt.program.arguments import N_TRIAL_ROWS, Args, cycle, fill_all
from bayes_mpt.program.densities import log_density
from bayes_mpt.program.factor_runs import read_factors
from bayes_mpt.program.layout import rows_first
from bayes_mpt.program.program import Model, ModelError, Program, list_names, split_events
from bayes_mpt.program.run import run
from bayes_mpt.program.store import own_random_state
from bayes_mpt.program.value_checks import check_values

__all__ = ["enumerated", "mixture_of_maps"]

MAX_MAPS = 256  # joint values of a row's discrete latents, each with a map of its own


class _Enumerated(NodeSource):
    """No nodes at all: every latent is discrete, and summed out."""

    name = "Exact"

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        # no distribution looks at the rows, and their number is read with them
        alone = len(args) == 1 and program.observed_argument == 0
        any_rows = alone and program.by_row and program.sub_rows is None
        self.model, self.structure = model, program._replace(serves_any_rows=any_rows)
        names = list_names(program.discrete)
        self.why = f"the values of {names} are summed out" if names else "the program has no latents"

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        factors = read_factors(self.model, args.filled, self.structure)
        complete = all(f is a for f, a in zip(args.filled, args.given, strict=True))
        # of complete rows this run has said what the tokens are
        value = factors.value if complete else program_values(self.model, args, self.structure)
        zero = value.new_zeros(1, factors.n_rows)
        return Read(
            Factorized(factors), zero, value, factors.scale, value.new_zeros(1, factors.n_rows, 0), ()
        )


def enumerated(model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
    """Programs whose latents are all discrete."""
    source = _Enumerated(model, args, program)
    check_values(model, fill_all(args), program)
    return source


class _Maps(NodeSource):
    """One node for each joint value of a row's discrete latents, with a linear-Gaussian map of its own.

    The number of that value in each row is a covariate of a linear-Gaussian program, so that one program is found out
    about, and not one for each value.
    """

    name = "Exact"

    def __init__(self, model: Model, args: tuple[Any, ...], program: Program):
        self.model = model
        self.values = _joint_values(model, args, program)  # (S,) of each site
        self.n_nodes = len(next(iter(self.values.values())))
        names = list_names(program.discrete)
        self.why = (
            f"the values of {names} are summed out, and given them every mean is affine in the other latents"
        )
        self.structure = program
        label = torch.arange(len(args[0]), device=args[0].device) % self.n_nodes
        self.maps = LinearGaussian(self._labelled(), (*args, label), max(N_TRIAL_ROWS, 2 * self.n_nodes))
        self.shared = len(args) == 1 and program.sub_rows is None and self._same_for_all_rows(args, label)
        scores_input = self.shared and self.maps.structure.observed_argument == 0 and program.scale == 1.0
        self.structure = program._replace(
            per_row=not scores_input,
            scores_input=scores_input,
            observed_argument=self.maps.structure.observed_argument,
        )
        if program.continuous:
            filled = fill_all(args)
            first, second = (self._log_prior(filled, label, seed) for seed in range(2))
            if not torch.allclose(first, second, rtol=1e-9, atol=1e-12):
                raise ModelError(
                    f"the distribution of {list(program.discrete)} depends on {list(program.continuous)}: given the "
                    "discrete values the others are not Gaussian. Use Importance() with a guide"
                )

    def place(self, args: Args, visible: Tensor | None = None, near: Any = None) -> Read:
        if self.shared:
            together, log_weight = self._read_shared(args.filled)
            scores_input = self.structure.scores_input
            value = args.given[0] if scores_input else program_values(self.model, args, self.structure)
            given, scale = AffineBatch(shared=together), together.scale
        else:
            x = args.given[0]
            labels = [torch.full((len(x),), s, device=x.device) for s in range(self.n_nodes)]
            maps = [self.maps.read((*args.given, label)) for label in labels]
            log_weight = torch.stack([self._log_prior(args.filled, label) for label in labels])  # (S, N)
            value, given, scale = maps[0].value, AffineBatch(maps), maps[0].scale
        # which value each site has at each node, a block of columns for each site
        blocks = [v.unique(return_inverse=True)[1] for v in self.values.values()]
        one_hot = torch.cat([torch.nn.functional.one_hot(b) for b in blocks], -1).to(log_weight)
        latents = one_hot[:, None].expand(-1, log_weight.shape[1], -1)
        return Read(given, log_weight, value, scale, latents, ())

    def _labelled(self, hide: bool = True) -> _Labelled:
        return _Labelled(self.model, self.structure, self.values, hide)

    def _read_shared(self, filled: tuple[Any, ...]) -> tuple[LinearRows, Tensor]:
        """The S maps, and the logarithms (S, 1) of their weights, from a row for each."""
        label = torch.arange(self.n_nodes, device=filled[0].device)
        rows = tuple(cycle(a, self.n_nodes) for a in filled)
        return self.maps.read((*rows, label)), self._log_prior(rows, label)[:, None]

    def _same_for_all_rows(self, args: tuple[Any, ...], label: Tensor) -> bool:
        """Whether maps and weights that are read from S rows are those of all rows; each row shows it for one value."""
        filled = fill_all(args)
        try:
            together, log_weight = self._read_shared(filled)
        except (RuntimeError, ValueError, IndexError):
            return False  # the program does not take S rows, or they differ
        prior = self._log_prior(filled, label)
        return bool((prior == log_weight[label, 0]).all()) and same_by_label(
            self._labelled(), (*args, label), self.maps.form, together.reading, label
        )

    def _log_prior(self, filled: tuple[Any, ...], label: Tensor, seed: int = 0) -> Tensor:
        """log p(discrete values) of each row (N,); the other latents are drawn, and must not matter."""
        with own_random_state(seed):
            trace = run(self._labelled(hide=False), (*filled, label))
        parts = []
        for site in self.structure.latents:
            if site.discrete:
                node = trace.nodes[site.name]
                parts.append(rows_first(log_density(node["fn"], node["value"]), site.row_axis).sum(-1))
        return torch.stack(parts).sum(0)


def mixture_of_maps(model: Model, args: tuple[Any, ...], program: Program) -> NodeSource:
    """Programs that are linear-Gaussian given the discrete latents of each row."""
    return _Maps(model, args, split_events(program))


def _joint_values(model: Model, args: tuple[Any, ...], program: Program) -> dict[str, Tensor]:
    """All joint values of a row's discrete latents: (S,) of each site."""
    trace = run(model, fill_all(args))
    supports, sites = [], []
    for site in program.latents:
        if not site.discrete:
            continue
        if site.row_axis is None and program.by_row:
            raise ModelError(f"discrete latent {site.name!r} is outside the rows plate")
        support = trace.nodes[site.name]["fn"].enumerate_support(expand=False)
        event = trace.nodes[site.name]["fn"].event_dim
        if site.row_axis is None or site.width != 1 or event:
            raise ModelError(
                f"discrete latent {site.name!r} has {site.width} values a row beside Gaussian tokens: only one value "
                "a row and site can be summed together with linear-Gaussian maps. Write tokens that are independent "
                "given the discrete latents, or use Importance() with a guide"
            )
        supports.append(support.reshape(-1))
        sites.append(site)
    n_maps = 1
    for s in supports:
        n_maps *= len(s)
    if n_maps > MAX_MAPS:
        raise ModelError(
            f"discrete latents {[s.name for s in sites]} have {n_maps} joint values, more than {MAX_MAPS} "
            "linear-Gaussian maps: use fewer values"
        )
    columns = zip(*product(*supports), strict=True)
    return {site.name: torch.stack(column) for site, column in zip(sites, columns, strict=True)}


class _Labelled:
    """A program in which a further argument (N,) numbers the joint value of each row's discrete latents."""

    def __init__(self, model: Model, program: Program, values: dict[str, Tensor], hide: bool):
        self.model, self.values, self.hide = model, values, hide
        self.n_rows = program.sub_rows
        self.axes = {
            s.name: (s.row_axis or 0, s.n_batch) for s in program.latents if s.discrete
        }  # all in the plate

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        *rest, label = args
        sites = {}
        for name, value in self.values.items():
            axis, n_batch = self.axes[name]
            shape = [1] * n_batch
            shape[axis] = -1
            sites[name] = value[label[: self.n_rows]].reshape(shape)
        return FixedSites(self.model, sites, self.hide)(*rest)
