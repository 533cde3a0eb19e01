"""The analysis of a program: run it and find out what it is made of.

A program is read by evaluation, never by name or by source. Its tokens are the values of its observed sites: all
elements of them, site after site, where a site's distribution has a density for each element; a whole event (a
Multinomial count, say) where it has not.
"""

from __future__ import annotations

from typing import Any

import torch

from bayes_mpt.program.arguments import fill
from bayes_mpt.program.checks import (
    check_latent,
    check_observed,
    check_plates,
    check_support,
    refuse_dependence_on_x,
    refuse_unregistered_parameters,
)
from bayes_mpt.program.missing import nan_shows
from bayes_mpt.program.program import Model, ModelError, Program
from bayes_mpt.program.run import first_run
from bayes_mpt.program.sites import (
    describe_latent,
    describe_observed,
    factor_nodes,
    latent_nodes,
    observed_nodes,
    plate_depth,
    rows_plate_of,
)

__all__ = ["analyze"]


@torch.enable_grad()
def analyze(model: Model, args: tuple[Any, ...], *, own_masks: bool = False) -> Program:
    """Run the program on real rows and find out what it is made of.

    The first run also creates the parameters that the program initialises from ``x``.

    Parameters
    ----------
    model : callable
        A Pyro program.
    args : tuple
        What the program is called with; tensors have N rows. NaN cells are filled.
    own_masks : bool, default=False
        The program hides tokens itself, and its distributions look at the visible ones. It may have factors
        (`factor_nodes`), which train it and enter no score.

    Returns
    -------
    Program

    Raises
    ------
    ModelError
        If nothing is observed, a factor stands in the program, a token's distribution looks at the tokens, or
        trainable tensors are unknown to Pyro. The site is named.
    """
    args = tuple(fill(a) for a in args)
    first, init = first_run(model, args)
    factors = factor_nodes(first)
    nodes = observed_nodes(first, factors_too=own_masks)
    latents = latent_nodes(first)
    rows, by_row = rows_plate_of(nodes, latents, len(init[0]))
    sites = tuple(describe_observed(node, rows if by_row else None) for node in nodes)
    n_rows = sites[0].shape[sites[0].row_axis] if by_row and sites[0].row_axis is not None else 1
    program = Program(
        sites,
        tuple(describe_latent(node, rows if by_row else None) for node in latents),
        tuple(n for n, site in first.nodes.items() if site["type"] == "param"),
        rows,
        by_row,
        plate_depth((*nodes, *latents)),
        n_rows if by_row and n_rows != len(init[0]) else None,
        float(nodes[0]["scale"]),
    )
    for node in latents:
        check_latent(node)
    for node in (*nodes, *latents):
        check_plates(node)
    for node in nodes:
        check_support(node)
    check_observed(model, init, first, own_masks=own_masks)
    scales = {n["name"]: float(n["scale"]) for n in (*nodes, *latents, *factors)}
    if len(set(scales.values())) > 1:
        raise ModelError(
            f"sites have different scales {scales}: a score weighs all sites alike. Sub-sample the rows plate, or put "
            "poutine.scale around the whole program"
        )
    refuse_unregistered_parameters(first)
    if program.sub_rows is None and not own_masks:
        tokens = refuse_dependence_on_x(model, init, program, first)
        if len(nodes) == 1 and not sites[0].n_joint:
            whole = [i for i in tokens if nodes[0]["value"] is init[i]]
            if whole and nan_shows(model, init, whole[0], first):
                program = program._replace(observed_argument=whole[0])
    return program
