"""Beside what people would use instead: `python -m benchmarks.peers`, the part "Peers" of RESULTS.md.

A side does rows in a process of its own (`side`), its engine or client resident where it can be: `ceilings`,
`own_engine`, `rays`, `run_batch`, `clients`, `harnessed`, and `foreign` with its scripts for environments of
their own. `groups` says which start together and what they do, `field` runs them in turn, `plan` has the
rows, `usage` the CPU; `bad_rows` and `crashes` look at what goes wrong; `page` and `chart` show it.
"""
