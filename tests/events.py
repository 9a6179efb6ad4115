"""The events at this session's Prefect server."""

from __future__ import annotations

from typing import Any

from prefect import get_client

from tests.eventually import eventually


def events_where(count: int, **wanted: Any) -> list[dict[str, Any]]:
    """The events that Prefect's filter `wanted` selects, oldest first, once there are so many."""
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        with get_client(sync_client=True) as client:
            query = {"filter": {**wanted, "order": "ASC"}, "limit": 50}
            found[:] = client._client.post("/events/filter", json=query).json()["events"]
        return len(found) >= count

    assert eventually(all_there)
    assert len(found) == count
    return found
