"""What Redis has been told: the versions of the records. Used by the control plane only."""

from collections.abc import Sequence

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient


class Published:
    """The records of one Redis. Every method may raise ``CountersUnavailableError``."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def tenant_versions(self, tenant_ids: Sequence[str]) -> list[int | None]:
        """Return the version of each tenant's record, in one trip; ``None`` where there is none."""
        return await self._versions([keys.tenant(tenant_id) for tenant_id in tenant_ids])

    async def key_versions(self, api_keys: Sequence[tuple[str, str]]) -> list[int | None]:
        """Likewise for API keys, named as (tenant id, key id)."""
        return await self._versions([keys.api_key(tenant_id, key_id) for tenant_id, key_id in api_keys])

    async def _versions(self, records: Sequence[str]) -> list[int | None]:
        replies = await self._redis.pipeline([("HGET", record, "version") for record in records])
        return [None if version is None else int(version) for version in replies]
