"""Small programs that run as they are. From the repository: `python -m examples.first_answers`."""
