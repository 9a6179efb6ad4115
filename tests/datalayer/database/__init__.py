"""Tests of `datalayer/database`."""
