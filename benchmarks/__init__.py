"""What `vllm_tasks` costs beside the same work without it: measures P1, P2, P5 and P6.

`make bench` runs all, `make bench-P1` one; `make bench ARGS="P1 --data questions.jsonl"` takes
options. Both sides of a measure run interleaved on one machine. `pairs` has the statistics,
`workload` the rows, `children` the processes; each measure is a file of its own.
"""
