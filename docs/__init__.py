"""The documentation site; `python -m docs.figures` writes what is copied into it."""
