"""Small programs that run as they are. From the repository: `python -m examples.first_answers`."""

import os

# Before Prefect is imported: its temporary server sends no usage data, logs only warnings, and has two
# minutes to start on a busy machine.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
