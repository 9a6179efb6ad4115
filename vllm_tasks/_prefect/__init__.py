"""The Prefect side of the tasks: names, retries, mapping, commits and events."""
