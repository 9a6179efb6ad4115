"""Databases: SQLAlchemy URLs that keep outputs as tables with a primary key."""
