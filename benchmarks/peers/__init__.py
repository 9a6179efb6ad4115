"""Comparison with other tools for the same work: `python -m benchmarks.peers`, the part "Peers" of
RESULTS.md.

A side processes rows in a process of its own (`side`), and its engine or client stays resident if possible:
`ceilings`, `own_engine`, `rays`, `run_batch`, `clients`, `harnessed`, and `foreign` with scripts for other
environments. `groups` has the sides that start together and their workloads, `field` runs them in turn,
`plan` has the rows, and `usage` the CPU. `bad_rows` and `crashes` observe failures; `page` and `chart` render
results.
"""
