"""Train networks: epochs of minibatches by Adam, stopped early by rows that are held out, resumable to the bit.

Two things make a large learning rate safe, whatever the loss: its first steps are small (those of a rate that is large
at once push latents out of use before the decoder has learnt what to do with them), and what is looked at and kept is
a running mean of the parameters over about an epoch, not the last step's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from bayes_mpt.masks import torch_generator
from bayes_mpt.predictors import Batch
from bayes_mpt.program.program import ModelError
from bayes_mpt.program.statistics import digest_of_rows
from bayes_mpt.program.store import own_random_state, random_states, set_random_states
from bayes_mpt.runtime.checkpoints import make_room, read, write
from bayes_mpt.training.problem import Fit, Problem, Report, check_start, restore

__all__ = ["train_by_epochs"]

KIND = "training by epochs"  # of its file
N_VALIDATION_DRAWS = 2  # draws of nodes and masks with which held-out rows are scored
MAX_STEPS = 3000  # of a stage, the last excepted: of many rows a cheap one would never have given all it can
WARM_UP = 300  # steps over which the learning rate rises from zero, or a tenth of all that there may be


@dataclass
class _Progress:
    """What a training that goes on must know, beside the parameters."""

    epoch: int
    mean: dict[str, Tensor]
    """Of the parameters over the last steps, about an epoch of them."""
    best_score: float
    best: dict[str, Tensor]
    stale: int
    """Epochs since the best, or since the stage began."""
    stage: int
    begun: int
    """Epoch in which the stage began."""


@dataclass
class _State:
    """What a training moves, and what moves it."""

    leaves: dict[str, Tensor]
    buffers: dict[str, Tensor]
    """What networks keep beside their parameters."""
    adam: torch.optim.Adam
    generator: torch.Generator
    fit: Fit

    def checked(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a file, if it is of the kind that `_keep` writes; a TypeError or KeyError otherwise."""
        progress, size = content["progress"], self.generator.get_state().numel()
        tensors = {name: content[name] for name in ("leaves", "buffers")}
        tensors |= {name: progress[name] for name in ("mean", "best")}
        sound = (
            set(progress) == set(_Progress.__annotations__)
            and all(type(progress[n]) is int for n in ("epoch", "stale", "stage", "begun"))
            and type(progress["best_score"]) is float
            and all(isinstance(t, Tensor) for found in tensors.values() for t in found.values())
            and all(isinstance(t, Tensor) for step in content["adam"] for t in step.values())
            and all(type(r) is str for r in content["rows"])
            and all(type(t) is str for both in content["told"].values() for t in both)
            and all(len(both) == 2 for both in content["told"].values())
            and all(type(v) is float for v in content["history"])
            and len(content["generators"]) >= 2
            and all(g.dtype == torch.uint8 and g.ndim == 1 for g in content["generators"])
            and all(g.numel() == size for g in content["generators"][:2])
        )
        shapes = {name: t.shape for name, t in content["leaves"].items()}
        for found in (progress["mean"], progress["best"]):
            sound = sound and {name: t.shape for name, t in found.items()} == shapes
        for step, shape in zip(content["adam"], shapes.values(), strict=True):
            sound = sound and all(step[n].shape == shape for n in ("exp_avg", "exp_avg_sq") if step)
        if not sound:
            raise TypeError("not what a training keeps")
        return content


def train_by_epochs(
    stages: Sequence[Problem],
    rows: Batch,
    held_out: Batch | None = None,
    *,
    batch_size: int,
    max_epochs: int,
    learning_rate: float,
    patience: int,
    random_state: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    asked: Mapping[str, tuple[str, str]] | None = None,
    report: Report | None = None,
) -> Fit:
    """Maximise the masked score by Adam over minibatches; the parameters' running mean ends where it scores best.

    Parameters
    ----------
    stages : sequence of Problem
        What is maximised, first with cheap steps, last with all the effort.
    rows : Batch
        That train.
    held_out : Batch, optional
        Rows that tell when one has given what it can: after ``patience`` epochs without a better
        score of them, all but the last after a third of these, or 3000 steps; on the same masks and nodes at every
        look. None: the stages share the epochs, and the last parameters are kept.
    batch_size : int
        Rows a step.
    max_epochs : int
        Passes over the rows that train.
    learning_rate : float
        Of Adam, after the first 300 steps (or a tenth of them all), over which it rises.
    patience : int
        Epochs.
    random_state : int, optional
        For the order of the rows and the masks; nodes draw from torch's global generator.
    checkpoint : path, optional
        Written whole after each epoch (`checkpoints`); where it exists, the training goes on from it as if
        it had never stopped. It knows its rows, since the scores of others would be those of rows that had been trained
        on, and its settings. A file that is damaged, or none of ours, is set aside with a warning.
    asked : dict, optional
        What else a checkpoint must agree in, by name: in words, and a digest of it (`bayes_mpt.runtime.digests`).
    report : callable, optional
        Called with (epoch, score a row); True stops.

    Returns
    -------
    Fit
        Its history is the score a row after each epoch, nats: of held-out rows, or else of the epoch's steps; with as
        much effort as the stage takes, so that it rises from stage to stage.

    Raises
    ------
    ModelError
        If a parameter, its gradient or the score is not finite; it is named.
    ValueError
        If the checkpoint is of another model, other settings, or other rows; which is named.
    CheckpointError
        If it cannot be written.
    """
    generator = torch_generator(random_state)
    problem = stages[-1]
    leaves = problem.leaves()
    fit = Fit("adam by epochs")
    check_start(problem, leaves, rows.take(torch.arange(min(batch_size, len(rows.args[0])))))
    look_seed = int(torch.randint(2**31, (), generator=generator))
    adam = torch.optim.Adam(list(leaves.values()), lr=learning_rate, fused=True)
    state = _State(leaves, _buffers(problem), adam, generator, fit)
    progress = _Progress(0, _copies(leaves), -math.inf, _copies(leaves), 0, 0, 0)
    file = None if checkpoint is None else Path(checkpoint).expanduser()
    digests = [] if file is None else [digest_of_rows(a.reshape(len(a), -1).cpu().numpy()) for a in rows.args]
    told = {
        **dict(asked or {}),
        "batch_size": (str(batch_size), repr(batch_size)),
        "learning_rate": (str(learning_rate), repr(learning_rate)),
    }
    if file is not None:
        make_room(file.parent, file.name)
        found = read(file, KIND, state.checked)
        if found is not None:
            progress = _resume(file, found, state, digests, told)
    training = _Training(
        stages, rows, held_out, batch_size, max_epochs, learning_rate, patience, look_seed, state, progress
    )
    try:
        while progress.epoch < max_epochs:
            if training.stage_over():
                if training.last_stage:
                    break
                training.next_stage()
                continue
            value = training.epoch()
            if file is not None:
                _keep(file, progress, state, digests, told)
            if report is not None and report(progress.epoch, value):
                break
    except KeyboardInterrupt:
        if not fit.history:
            raise
        fit.interrupted = True
    restore(leaves, progress.best)
    ended = held_out is None or (training.last_stage and progress.stale >= patience)
    fit.converged = ended and not fit.interrupted
    fit.n_iter = progress.epoch
    return fit


def _buffers(problem: Problem) -> dict[str, Tensor]:
    """What the networks of program and guide keep beside their parameters."""
    networks = {"model": problem.bound.model, "guide": problem.bound.guide}
    return {
        f"{kind}.{name}": buffer
        for kind, net in networks.items()
        if isinstance(net, torch.nn.Module)
        for name, buffer in net.named_buffers()
    }


@dataclass
class _Training:
    """One training under way: its settings, what it moves, and how far it is."""

    stages: Sequence[Problem]
    rows: Batch
    held_out: Batch | None
    batch_size: int
    max_epochs: int
    learning_rate: float
    patience: int
    look_seed: int
    """Of the draws on which held-out rows are scored at every look."""
    state: _State
    progress: _Progress

    @property
    def last_stage(self) -> bool:
        """Whether no other stage follows."""
        return self.progress.stage == len(self.stages) - 1

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.rows.args[0]) / self.batch_size)

    def stage_over(self) -> bool:
        """Whether the stage has given what it can."""
        progress = self.progress
        if self.held_out is None:
            return progress.epoch >= (progress.stage + 1) * self.max_epochs // len(self.stages)
        if self.last_stage:
            return progress.stale >= self.patience
        long = (progress.epoch - progress.begun) * self.per_epoch >= MAX_STEPS
        return long or progress.stale >= math.ceil(self.patience / 3)

    def next_stage(self) -> None:
        """Begin the stage that follows."""
        progress, leaves = self.progress, self.state.leaves
        progress.stage, progress.stale, progress.begun = progress.stage + 1, 0, progress.epoch
        if self.held_out is not None:  # from the best on, as the new stage sees it
            restore(leaves, progress.best)
            progress.mean = _copies(leaves)
            progress.best_score = self._look()

    def epoch(self) -> float:
        """One epoch, and its score a row: of held-out rows, or else of its steps."""
        progress, leaves = self.progress, self.state.leaves
        # the first epoch has shown every row to the distributions' checks, which take a tenth of a step
        with pyro.validation_enabled(progress.epoch == 0):
            value = self._pass()
            if not math.isfinite(value):
                raise ModelError(
                    f"the masked score became {value} in epoch {progress.epoch + 1}: lower learning_rate (now "
                    f"{self.learning_rate})"
                )
            if self.held_out is not None:
                with _at(leaves, progress.mean):
                    value = self._look()
        progress.epoch += 1
        self.state.fit.history.append(value)
        progress.stale += 1
        if value > progress.best_score or self.held_out is None:
            progress.best_score, progress.best, progress.stale = value, _copies(progress.mean), 0
        return value

    def _pass(self) -> float:
        """One pass over the rows: the mean score a row of its steps, or the first that is not finite."""
        problem, adam, generator = self.stages[self.progress.stage], self.state.adam, self.state.generator
        rising = self.learning_rate / max(1, min(WARM_UP, self.per_epoch * self.max_epochs // 10))
        total, n_rows = 0.0, len(self.rows.args[0])
        problem.objective.refresh()  # one that goes on from a checkpoint knows nothing of the epochs before
        batches = torch.randperm(n_rows, generator=generator).split(self.batch_size)
        (group,) = adam.param_groups
        for step, index in enumerate(batches, self.progress.epoch * len(batches) + 1):
            adam.zero_grad()
            score = problem.score(self.rows.take(index), generator)
            value = float(score.detach())
            if not math.isfinite(value):
                return value
            (-score).backward()
            group["lr"] = min(self.learning_rate, step * rising)
            adam.step()
            with torch.no_grad():
                for mean, leaf in zip(self.progress.mean.values(), group["params"], strict=True):
                    mean.lerp_(leaf, 1 / min(step, len(batches)))
            total += len(index) * value
        return total / n_rows

    def _look(self) -> float:
        """Mean score a row of what is held out, on the same draws each time; leaves the random state as it was."""
        problem, seed, held_out = self.stages[self.progress.stage], self.look_seed, self.held_out
        assert held_out is not None
        total, n_rows = 0.0, len(held_out.args[0])
        problem.objective.refresh()
        with torch.no_grad(), own_random_state(seed):
            generator = torch.Generator().manual_seed(seed)
            for _ in range(N_VALIDATION_DRAWS):
                for index in torch.arange(n_rows).split(self.batch_size):
                    total += len(index) * float(problem.score(held_out.take(index), generator))
        return total / N_VALIDATION_DRAWS / n_rows


@contextmanager
def _at(leaves: dict[str, Tensor], values: dict[str, Tensor]) -> Iterator[None]:
    """The parameters at other values for a while."""
    before = _copies(leaves)
    restore(leaves, values)
    try:
        yield
    finally:
        restore(leaves, before)


def _copies(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in leaves.items()}


def _keep(
    file: Path, progress: _Progress, state: _State, rows: list[str], told: dict[str, tuple[str, str]]
) -> None:
    steps = state.adam.state_dict()["state"]
    content: dict[str, Any] = {
        "rows": rows,
        "told": {name: list(both) for name, both in told.items()},
        "progress": vars(progress),
        "leaves": _copies(state.leaves),
        "buffers": _copies(state.buffers),
        "adam": [steps.get(i, {}) for i in range(len(state.leaves))],
        "generators": [state.generator.get_state(), *random_states()],
        "history": state.fit.history,
    }
    write(file, KIND, content)


def _resume(
    file: Path,
    content: dict[str, Any],
    state: _State,
    rows: list[str],
    told: dict[str, tuple[str, str]],
) -> _Progress:
    """Go on from a checkpoint, if it is one of this training."""
    advice = "Remove it, or give another checkpoint"
    for name, (now, value) in told.items():
        was, before = content["told"].get(name, ("none", ""))
        if before != value and name != "model":
            raise ValueError(
                f"{file} was written with {name} {was}, now {now}: it belongs to another training. {advice}"
            )
    found = {name: tuple(value.shape) for name, value in content["leaves"].items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in state.leaves.items()}
    if found != wanted:
        raise ValueError(
            f"{file} holds parameters {found}, the program has {wanted}: it belongs to another model. {advice}"
        )
    now, value = told.get("model", ("", ""))
    was, before = content["told"].get("model", ("", ""))
    if before != value:
        differ = f"{was}, now {now}" if was != now else f"{was}, whose code, values or packages have changed"
        raise ValueError(f"{file} was written with model {differ}: it belongs to another model. {advice}")
    sizes = {name: tuple(value.shape) for name, value in content["buffers"].items()}
    if sizes != {name: tuple(value.shape) for name, value in state.buffers.items()}:
        raise ValueError(f"{file} holds buffers {sizes} of networks: it belongs to another model. {advice}")
    if content["rows"] != rows:
        raise ValueError(f"{file} belongs to a training on other rows. {advice} (none in a cross-validation)")
    restore(state.leaves, content["leaves"])
    restore(state.buffers, content["buffers"])
    of_adam = state.adam.state_dict()
    of_adam["state"] = {i: step for i, step in enumerate(content["adam"]) if step}
    state.adam.load_state_dict(of_adam)
    own, *ours = content["generators"]
    state.generator.set_state(own)
    set_random_states(ours)
    state.fit.history[:] = content["history"]
    return _Progress(**content["progress"])
