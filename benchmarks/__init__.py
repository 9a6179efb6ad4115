"""Benchmarks: the cost of `vllm_tasks`, compared with the same work without it.

`make bench` runs all measures, `make bench-P1` runs one, and `make bench ARGS="P1 --data questions.jsonl"`
takes options. The two sides of a measure run in turn on one machine. `pairs` has the statistics,
`workload` the rows, `children` the processes; each measure has a file of its own.
"""
