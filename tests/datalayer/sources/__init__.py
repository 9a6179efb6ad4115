"""Tests of `datalayer/sources`."""
