"""Exact conditionals by Gaussian algebra: linear maps, chains, one vector of rows, its nearest neighbours.

In the room: ``linear`` (a map that rows share) and its maximum, ``profile`` (``factors``, ``newton``, ``modes``,
``by_rows``), with missing cells ``incomplete`` (``patterns``, ``climb``); ``markov`` (a chain of blocks,
``chain_tree``); ``process`` (one vector of rows), and ``nearest_neighbors`` where rows are many (``neighborhoods``,
``column_units``, ``row_sets``, ``vecchia``, ``near_objective``).

Touch freely: every formula has a dense truth in its tests. Nothing here runs a program but ``process`` and
``row_sets``.
"""
