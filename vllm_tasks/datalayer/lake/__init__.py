"""Lakes: folders and fsspec URLs that keep outputs as Delta tables."""
