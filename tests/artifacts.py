"""The artifacts at this session's Prefect server."""

from __future__ import annotations

from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import Artifact


def artifacts(key: str) -> list[Artifact]:
    """All artifacts of this key."""
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter.model_validate({"key": {"any_": [key]}}))
