"""Beside what people would use instead: `python -m benchmarks.peers`, the part "Peers" of RESULTS.md.

One side a file; each answers rows over a pipe from a process of its own (`side`), its engine resident
where it can be. `group_a` has those with an engine of their own, `group_b` the clients of one server;
`troubles` what happens to a bad row and to a killed process. Rounds are interleaved within a group.
"""
