"""What Prefect needs behind the tasks: names, retries, mapping, commits, events."""
