"""Faults by a seeded schedule, and the same check after each run.

`python -m tests.faults` (`make faults`) is the long form, which writes its part of `benchmarks/RESULTS.md`;
`test_faults.py` is the short one.
"""
