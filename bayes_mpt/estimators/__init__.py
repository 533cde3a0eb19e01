"""What users call: one estimator, comparisons and searches of its candidates; what they take in, what they store.

In the room, from the table that comes in to the one that goes out:

- ``rows``, ``adapted``, ``names``, ``availability``: what may come in, and what is offered.
- ``fit``, in the order in which it goes: ``dimension``, ``checks``, ``repeats``, ``penalty``, ``trainer``. It leaves a
  ``fitted``, which ``stored_fit`` makes again.
- ``bayes_mpt``, the estimator: it stores settings, checks them and passes on. Its answers are made in
  ``predictions``, ``sampling``, ``labelled``, ``criteria``, ``integrals``, ``weighed``, ``averaging``, ``report``; of
  some models also in ``loadings`` and ``decomposition``.
- ``search``, ``kernel_search`` and ``comparison`` rank ``candidates``: by one of the ``rules`` (``refits``: those
  that fit again), ``unbounded`` ones refused, the choice ``checked``. ``stages`` and ``evaluation`` do the work,
  ``stored`` keeps it, ``partial`` is what Ctrl-C leaves, ``table`` and ``summary`` say it, ``best`` answers for the
  best one.
- ``average`` mixes candidates: ``members``, ``odds``, ``stacking``.

Touch freely: a new answer is a function of a ``Fitted``, a new rule of evidence a class in ``rules`` with the two
methods of the others. Nothing here computes a density, and no file below knows an estimator.
"""
