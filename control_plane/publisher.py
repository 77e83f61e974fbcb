"""What the services ask of publishing: done before the answer, or one clear error."""

from typing import Protocol

from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.core.errors import DependencyUnavailableError, NotPublishedError

# Redis, or Postgres between the commit and the reading of what it has now.
_UNAVAILABLE = (CountersUnavailableError, DependencyUnavailableError)


class Snapshots(Protocol):
    """Brings a tenant's or a key's record to Redis."""

    async def publish(self, tenant_id: str) -> None:
        """Bring a tenant's."""

    async def publish_key(self, key_id: str) -> None:
        """Bring a key's."""


class CatalogJob(Protocol):
    """Brings providers and prices to Envoy and Redis."""

    async def run_once(self) -> bool:
        """Publish once; the answer is for who runs jobs."""


class Publisher:
    """Called after a change is committed and before it is answered, so that it holds for the very next call.

    Every method raises ``NotPublishedError`` when it cannot be brought there: the change is stored, and the job that
    compares Postgres with Redis will publish it.
    """

    def __init__(self, *, snapshots: Snapshots, catalog: CatalogJob) -> None:
        self._snapshots = snapshots
        self._catalog = catalog

    async def tenant(self, tenant_id: str) -> None:
        """Publish a tenant with its limits and budgets; of a deleted one its keys too."""
        try:
            await self._snapshots.publish(tenant_id)
        except _UNAVAILABLE as error:
            raise NotPublishedError("tenant", tenant_id) from error

    async def api_key(self, key_id: str) -> None:
        """Publish one API key."""
        try:
            await self._snapshots.publish_key(key_id)
        except _UNAVAILABLE as error:
            raise NotPublishedError("api key", key_id) from error

    async def catalog(self) -> None:
        """Publish providers and prices."""
        try:
            await self._catalog.run_once()
        except _UNAVAILABLE as error:
            raise NotPublishedError("catalog", "providers and prices") from error
