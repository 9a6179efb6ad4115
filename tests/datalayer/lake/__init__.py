"""Tests of `datalayer/lake`."""
