"""What dies on the way: faults by a seeded schedule, and after each run the same check.

`python -m tests.faults` (`make faults`) is the long form, which writes its part of `benchmarks/RESULTS.md`;
`test_faults.py` is the short one.
"""
