"""Programs that write the rows of the reference sets in `vllm_tasks/validation/sets/`.

python -m reference_sets

Each module has `rows()`, which returns the same rows on every machine and in every version of Python.
"""
