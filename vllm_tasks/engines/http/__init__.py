"""Engines over HTTP, for vLLM servers that run already."""
