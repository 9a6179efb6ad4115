"""A module whose import fails as that of one without its key does."""

raise RuntimeError("no key")
