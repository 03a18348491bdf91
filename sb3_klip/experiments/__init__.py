"""
Experiments over tasks, methods and seeds: ``python -m sb3_klip.experiments run`` and ``report``.

A *suite* is a YAML file (:mod:`~sb3_klip.experiments.suite`); each of its *cells*, one task × method × seed, is one ordinary
run of ``rl_zoo3.train`` (:mod:`~sb3_klip.experiments.cell`), which Dask hands to the workers of one machine or of many
(:mod:`~sb3_klip.experiments.scheduling`). What a cell leaves is one small file (:mod:`~sb3_klip.experiments.results`), from
which all tables and figures are made (:mod:`~sb3_klip.experiments.report`, :mod:`~sb3_klip.experiments.figures`).
"""
