"""After Pyro's example of hidden Markov models of music: two tones a step, sequences of unequal length.

A table holds a sequence a row, step after step, two tones a step; what is behind a sequence's end is no observation.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from scipy.special import betaln, logsumexp
from torch import nn
from torch.distributions import constraints
from zoo.case import Array, Case
from zoo.programs_pyro_mixtures import log_dirichlet_multinomial

STATES, TONES, STEPS = 2, 2, 5


def transition_start():
    return 0.6 * torch.eye(STATES) + 0.4 / STATES


def hmm_0(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("sequences", len(sequences)):
        length = int(lengths[i])
        sequence = sequences[i, :length]
        x = 0
        for t in pyro.markov(range(length)):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
            with tones_plate:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t])


def hmm_1(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        x = 0
        for t in pyro.markov(range(STEPS)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[:, t])


def hmm_2(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, 2, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        x, y = 0, 0
        for t in pyro.markov(range(STEPS)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate as tones:
                    y = pyro.sample(
                        f"y_{t}", dist.Bernoulli(probs_y[x, y, tones]), obs=sequences[:, t]
                    ).long()


def hmm_3(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_w = pyro.param("probs_w", transition_start, constraint=constraints.simplex)
    probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, STATES, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        w, x = 0, 0
        for t in pyro.markov(range(STEPS)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"})
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[:, t])


def hmm_4(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_w = pyro.param("probs_w", transition_start, constraint=constraints.simplex)
    probs_x = pyro.param(
        "probs_x", lambda: transition_start().expand(STATES, STATES, STATES), constraint=constraints.simplex
    )
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, STATES, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        # torch.long: w and x are indices from the start
        w = x = torch.tensor(0, dtype=torch.long)
        for t in pyro.markov(range(STEPS)):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer={"enumerate": "parallel"})
                x = pyro.sample(
                    f"x_{t}", dist.Categorical(Vindex(probs_x)[w, x]), infer={"enumerate": "parallel"}
                )
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tones]), obs=sequences[:, t])


class TonesGenerator(nn.Module):
    """Logits of the next tones from the state and the last tones."""

    def __init__(self):
        super().__init__()
        self.x_to_hidden = nn.Linear(STATES, 3)
        self.y_to_hidden = nn.Linear(TONES, 3)
        self.hidden_to_logits = nn.Linear(3, TONES)

    def forward(self, x, y):
        one_hot = nn.functional.one_hot(x.long(), STATES).to(y.dtype)
        return self.hidden_to_logits(torch.relu(self.x_to_hidden(one_hot) + self.y_to_hidden(y)))


class NetworkHMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = TonesGenerator()

    def forward(self, table, lengths):
        sequences = table.reshape(len(table), STEPS, TONES)
        tones_generator = pyro.module("tones_generator", self.generator)
        probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
        tones_plate = pyro.plate("tones", TONES, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2):
            x, y = 0, sequences.new_zeros(1, TONES)
            for t in pyro.markov(range(STEPS)):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                    with tones_plate:
                        logits = tones_generator(x.squeeze(-1), y)
                        y = pyro.sample(f"y_{t}", dist.Bernoulli(logits=logits), obs=sequences[:, t])


def hmm_6(table, lengths):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_x = pyro.param(
        "probs_x", lambda: transition_start().expand(STATES, STATES, STATES), constraint=constraints.simplex
    )
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, TONES), constraint=constraints.unit_interval
    )
    tones_plate = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        x_prev = x_curr = torch.tensor(0)
        for t in pyro.markov(range(STEPS), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x_next = pyro.sample(
                    f"x_{t}",
                    dist.Categorical(Vindex(probs_x)[x_prev, x_curr]),
                    infer={"enumerate": "parallel"},
                )
                x_prev, x_curr = x_curr, x_next
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x_curr.squeeze(-1)]), obs=sequences[:, t])


def hmm_7(table):
    sequences = table.reshape(len(table), STEPS, TONES)
    probs_x = pyro.param("probs_x", transition_start, constraint=constraints.simplex)
    probs_y = pyro.param(
        "probs_y", lambda: 0.3 + 0.4 * torch.rand(STATES, TONES), constraint=constraints.unit_interval
    )
    with pyro.plate("sequences", len(sequences), dim=-1):
        emission = dist.Bernoulli(probs_y).to_event(1)
        init_logits = torch.tensor([0.0, -float("inf")])
        x = dist.DiscreteHMM(init_logits, probs_x.log(), emission, duration=STEPS)
        pyro.sample("y", x, obs=sequences)


def hmm_with_priors(table):
    n_steps = table.shape[1]
    probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1))
    probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([STATES]).to_event(1))
    with pyro.plate("sequences", len(table), dim=-1):
        x = 0
        for t in pyro.markov(range(n_steps)):
            x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x]), obs=table[:, t])


def music(rng: np.random.Generator) -> Array:
    """(8, 10): two states that stay, each with its tone."""
    state = np.cumsum(rng.uniform(size=(8, STEPS)) < 0.3, axis=1) % 2
    p = np.where(state[..., None] == np.arange(TONES), 0.8, 0.25)
    return (rng.uniform(size=p.shape) < p).astype(float).reshape(8, -1)


def music_and_lengths(rng: np.random.Generator) -> tuple[Array, Array]:
    table = music(rng)
    lengths = rng.integers(3, STEPS + 1, size=8).astype(float)
    behind = np.repeat(np.arange(STEPS), TONES) >= lengths[:, None]
    table[behind] = 0.0
    return table, lengths


def two_short_sequences(rng: np.random.Generator) -> tuple[Array]:
    return (music(rng)[:2, ::2],)


def by_paths(table: Array, lengths: Array, n_states: int, first: Array, move, emit) -> float:
    """Sum over all paths: p(x_1) prod move(x_t-2, x_t-1) [x_t] prod_t prod_d Bernoulli(y_td | emit(x_t, y_t-1))."""
    total = 0.0
    for row, length in zip(table, lengths.astype(int), strict=True):
        y = row.reshape(STEPS, TONES)[:length]
        terms = []
        for path in product(range(n_states), repeat=length):
            with np.errstate(divide="ignore"):
                log_p, before = np.log(first[path[0]]), np.zeros(TONES)
                for t, x in enumerate(path):
                    if t:
                        log_p += np.log(move(path[t - 2] if t > 1 else 0, path[t - 1])[x])
                    p = emit(x, before)
                    log_p += np.log(np.where(y[t] == 1, p, 1 - p)).sum()
                    before = y[t]
            terms.append(log_p)
        total += logsumexp(terms)
    return total


def one_chain(params, table, lengths):
    move, emit = params["probs_x"], params["probs_y"]
    return by_paths(table, lengths, STATES, move[0], lambda _, x: move[x], lambda x, y: emit[x])


def autoregressive(params, table, lengths):
    move, emit = params["probs_x"], params["probs_y"]
    tone = np.arange(TONES)
    return by_paths(
        table, lengths, STATES, move[0], lambda _, x: move[x], lambda x, y: emit[x, y.astype(int), tone]
    )


def two_chains(params, table, lengths):
    """The pair (w, x) is one state of four."""
    move = np.kron(params["probs_w"], params["probs_x"])
    emit = params["probs_y"].reshape(4, TONES)
    return by_paths(table, lengths, 4, move[0], lambda _, s: move[s], lambda s, y: emit[s])


def product_of_chains(params, table, lengths):
    """As before, but x moves by the new w: p(w' | w) p(x' | w', x)."""
    move = np.einsum("wv,vxy->wxvy", params["probs_w"], params["probs_x"]).reshape(4, 4)
    emit = params["probs_y"].reshape(4, TONES)
    return by_paths(table, lengths, 4, move[0], lambda _, s: move[s], lambda s, y: emit[s])


def network(params, table, lengths):
    p = {name.removeprefix("tones_generator$$$"): value for name, value in params.items()}
    move = p["probs_x"]

    def emit(x, y):
        hidden = p["x_to_hidden.weight"][:, x] + p["x_to_hidden.bias"]
        hidden = hidden + p["y_to_hidden.weight"] @ y + p["y_to_hidden.bias"]
        logits = p["hidden_to_logits.weight"] @ np.maximum(hidden, 0) + p["hidden_to_logits.bias"]
        return 1 / (1 + np.exp(-logits))

    return by_paths(table, lengths, STATES, move[0], lambda _, x: move[x], emit)


def second_order(params, table, lengths):
    move, emit = params["probs_x"], params["probs_y"]
    return by_paths(table, lengths, STATES, move[0, 0], lambda a, b: move[a, b], lambda x, y: emit[x])


def whole_sequences(params, table):
    """`DiscreteHMM` moves before its first step: the first state is drawn from the row of state 0."""
    return one_chain(params, table, np.full(len(table), STEPS))


def priors_by_paths(params, table):
    """All 2^10 paths of two sequences: transitions are Dirichlet, tones Beta by counts."""
    alpha = 0.9 * np.eye(STATES) + 0.1
    terms = []
    for path in product(range(STATES), repeat=table.size):
        x = np.array(path).reshape(table.shape)
        before = np.column_stack([np.zeros(len(x), int), x[:, :-1]])
        moves = np.array([[((before == a) & (x == b)).sum() for b in range(STATES)] for a in range(STATES)])
        on, off = (np.array([((x == k) & (table == v)).sum() for k in range(STATES)]) for v in (1, 0))
        log_p = log_dirichlet_multinomial(moves.astype(float), alpha).sum()
        terms.append(log_p + (betaln(0.1 + on, 0.9 + off) - betaln(0.1, 0.9)).sum())
    return logsumexp(terms)


CASES = [
    Case("hmm_0_loop_of_sequences", hmm_0, music_and_lengths, one_chain, slow=True),
    Case("hmm_1_plate_of_sequences", hmm_1, music_and_lengths, one_chain, slow=True),
    Case("hmm_2_autoregressive", hmm_2, music_and_lengths, autoregressive, slow=True),
    Case("hmm_3_two_chains", hmm_3, music_and_lengths, two_chains, slow=True),
    Case("hmm_4_product_of_chains", hmm_4, music_and_lengths, product_of_chains, slow=True),
    Case("hmm_5_network", NetworkHMM, music_and_lengths, network, slow=True),
    Case("hmm_6_second_order", hmm_6, music_and_lengths, second_order, slow=True),
    Case("hmm_7_discrete_hmm", hmm_7, lambda rng: (music(rng),), whole_sequences),
    Case(
        "hmm_with_priors",
        hmm_with_priors,
        two_short_sequences,
        priors_by_paths,
        tolerance=1e-2,
        se=0.04,
        slow=True,
    ),
]
