"""One call, worked out: what is sent for a row, and what its answer becomes."""
