"""Rows of a chain of sites, whose density is enumerated, and what a masked network says of them."""

from __future__ import annotations

import numpy as np
import pyro
import torch
from truths import every_row

from bayes_mpt.program.sites import base

T, L = 6, 3
STATES = torch.from_numpy(every_row(T, L))  # (L^T, T)


def log_source(rows):
    """(N,) log-density of codes: neighbours are alike e^2 times as often as not, and even sites like level 0 a bit."""
    score = 2.0 * (rows[:, 1:] == rows[:, :-1]).sum(1) + 0.5 * (rows[:, ::2] == 0).sum(1)  # (N,)
    alike = 2.0 * (STATES[:, 1:] == STATES[:, :-1]).sum(1) + 0.5 * (STATES[:, ::2] == 0).sum(1)  # (L^T,)
    return score.double() - alike.double().logsumexp(0)


TABLE = log_source(STATES)


def sample(n, seed):
    index = torch.multinomial(TABLE.exp(), n, True, generator=torch.Generator().manual_seed(seed))
    return STATES[index].numpy().astype(np.float32)


def gap(model):
    """Entropy of the source that the area misses, nats a row: expectation over all L^T rows."""
    return float(TABLE.exp().numpy() @ (TABLE.numpy() - model.score_samples(STATES.float().numpy())))


def said(model, x, visible):
    return base(pyro.poutine.trace(model).get_trace(x, visible).nodes["x"]["fn"]).logits


def logits(model, x, visible):
    """What is said of all tokens (N, T, L), at parameters away from their start."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        first = torch.as_tensor(sample(50, 9)).clamp(max=1)
        model(first, torch.ones_like(first, dtype=torch.bool))
        with torch.no_grad():
            for _, leaf in pyro.get_param_store().named_parameters():
                leaf += 0.3 * torch.randn(leaf.shape)
            return said(model, x, visible)


def shaken(model, x):
    """Parameters of the program (in the store) moved away from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(x, torch.ones_like(x, dtype=torch.bool))
        with torch.no_grad():
            for _, leaf in pyro.get_param_store().named_parameters():
                leaf += 0.3 * torch.randn(leaf.shape)
    return {name: leaf.detach().numpy().copy() for name, leaf in pyro.get_param_store().named_parameters()}


def rows_and_masks(n=12):
    """Some tokens visible, at least two, and some hidden."""
    x = torch.as_tensor(sample(n, 3)).double()
    visible = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, :2], visible[:, 5] = True, False
    return x, visible
