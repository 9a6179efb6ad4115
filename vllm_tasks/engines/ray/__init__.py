"""vLLM engines in actors on a Ray cluster."""
