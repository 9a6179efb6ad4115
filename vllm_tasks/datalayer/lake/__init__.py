"""Lakes: folders and fsspec URLs, whose outputs are Delta tables."""
