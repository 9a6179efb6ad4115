"""One call in detail: the request that is sent for a row, and the value that its answer becomes."""
