"""Databases: SQLAlchemy URLs, whose outputs are tables with a primary key."""
