"""Benchmarks, which people run by hand.

`python -m tests.benchmarks` compares minia3 with transformers + PEFT; published/ has the runs that
the documents show, and `jobs` times whole jobs of both. `floors` measures what nothing can beat.
`operators` says where the time goes, and `launches` counts operators. `growth` measures how our
cost grows, `memory` compares the plan of `info` with real processes, and `study_inputs` makes what
the studies in studies/ train on: the runs behind the tables of the documentation.
tests/test_benchmarks.py and tests/test_jobs.py run most of them on tiny models.
"""
