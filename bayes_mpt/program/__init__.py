"""A Pyro program as an object: what it is made of, how it runs, its linear-Gaussian map, densities and parameters.

In the room:

- ``program`` says what a program is made of, as plain data; ``offers`` what it may say of itself.
- ``run`` runs it, with ``store`` around it, on ``devices``; ``batched`` runs it at many values; ``arguments`` are
  what it is called with, ``statistics`` their moments, ``location`` where they lie.
- ``analysis`` finds out what it is, from a `FirstRun` and others that are compared with it; ``sites`` and ``layout``
  are its sites, rows and tokens.
- Trials, which refuse what has no density: ``trials`` (``other_latents``, ``checks``, ``missing``), ``mask_trials``,
  ``shift_trials`` (``shifts``), ``token_graph`` (``token_order``), ``value_checks``; of factors ``own_factors``
  (``factor_laws``; ``factor_checks`` by ``factor_sums`` and ``pair_sums``).
- Densities: ``factor_runs`` makes ``factors`` of runs (``densities``, ``joint_values``, ``seen_labels``,
  ``whole_plates``); ``latents`` are real vectors, ``groups`` those that are independent; ``simulation`` draws rows.
- ``affine/``: whether all of it is linear and Gaussian, and the map.

Touch with care: trials are judged by tests that plant what must be refused. A new refusal is a trial with its own
test; what is known of a site belongs to ``sites`` and ``layout``, so that no other file asks Pyro's trace for it.
"""
