"""Conditionals of programs that are tractable once a few latents are given: averages over weighted nodes.

In the room: ``weighted`` is the average, and what a source of nodes is; ``given`` what is said of tokens given nodes
(more of it in ``row_nodes`` and ``group_nodes``, which integrate rows and groups inside). The sources:

- ``enumeration`` and ``vector_maps``: values of discrete latents.
- ``quadrature``: ``rules`` of nodes, placed by ``adaptive`` (``newton``, ``conjugacy``, ``nearby``, ``prior``).
- ``guide`` (``guide_runs``, ``reparameterized``, ``slopes``) and ``importance``: draws.
- Densities that jump: ``panels`` (``panel_nodes``) of one latent, ``replicates`` of several; ``probes``.
- Rows with slow tails: ``row_draws``, beside latents that are led ``from_prior`` (``leading``).
- Every mode of latents that all rows share: ``modes``, ``symmetries``, ``mixture``, ``pieces``, ``population``.
- ``annealed`` and ``smc`` (``particles``, ``path``, ``reference``, ``resampling``, ``missed``, ``own_units``): draws
  that move by ``tempering``; ``two_sided`` bounds them.

A new source has one method, ``place``. What its numbers are off by goes into ``evidence``, and is tested from both
sides.
"""
