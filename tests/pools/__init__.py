"""Tests of the room `pools`."""
