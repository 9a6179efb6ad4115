"""Tests of `engines/http`."""
