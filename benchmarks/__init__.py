"""Cases (test_bench_*.py) -> one timing core (timing.py) -> rows (results/<machine>/*.csv) -> plot.py and report.py.

`make bench` runs all of it. Pieces: `pytest benchmarks/ --benchmark-only [-k ...] [--seconds S] [--results DIR]`,
`python -m benchmarks.memory`, `python -m benchmarks.plot [DIR]`, `python -m benchmarks.report [DIR]`; the last two take
the folders of all machines without DIR.
"""
