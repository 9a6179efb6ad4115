"""Rows over HTTP, to vLLM servers that somebody runs."""
