"""What a long call does besides its numbers: threads and workers, Ctrl-C, progress, files of finished work.

In the room: ``serial`` (one thread at a time; all is left as it was found where a call fails), ``interrupts`` (Ctrl-C),
``progress``, ``tasks`` (side by side), ``checkpoints`` (files), ``digests`` and ``versions`` (what a result depends
on).

Nothing here knows a program or an estimator. A change of ``digests`` makes stored results strangers: they are
computed again.
"""
