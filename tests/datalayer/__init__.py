"""Tests of the room `datalayer`."""
