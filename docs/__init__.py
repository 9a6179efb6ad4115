"""The documentation site; `python -m docs.figures` writes its generated parts."""
