"""Brings tenants' and keys' records from Postgres to Redis: at once after a change, and again by a sweep."""

import logging
import time
from collections.abc import Callable

from budgetguard.adapters.postgres.api_keys import ApiKeyRepository
from budgetguard.adapters.postgres.budgets import BudgetRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.client import CountersUnavailableError
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.published import Published
from budgetguard.core.errors import DependencyUnavailableError
from budgetguard.core.snapshot import KeySnapshot, Status
from control_plane.reconciler import Reconciler

logger = logging.getLogger(__name__)

# Records compared in one query and one trip.
PAGE = 500

# A change is visible in Postgres up to a transaction's length after its updated_at; look back that much further.
OVERLAP_S = 60.0

# Redis may have lost records without anything having changed in Postgres.
FULL_SWEEP_EVERY_S = 300.0


class SnapshotPublisher:
    """Publishes what is newer. Used by the RPCs after their commit, by the sweep, and by a rebuild.

    Into ``waiting`` go tenants some of whose new counters hold what older calls do: to be compared until these ended.
    """

    def __init__(
        self,
        *,
        tenants: TenantRepository,
        api_keys: ApiKeyRepository,
        budgets: BudgetRepository,
        counters: Counters,
        published: Published,
        reconciler: Reconciler,
        waiting: set[str],
    ) -> None:
        self._tenants = tenants
        self._api_keys = api_keys
        self._budgets = budgets
        self._counters = counters
        self._published = published
        self._reconciler = reconciler
        self._waiting = waiting

    async def publish(self, tenant_id: str, *, wait: bool = True) -> None:
        """Publish a tenant, and its keys when it was deleted.

        New budgets are counted from now on, and enforced as soon as they have their past: at once, if the ledger has it
        (``wait``), else when the job that compares counters has found it.

        Raises:
            NotFoundError: there never was such a tenant.
            DependencyUnavailableError, CountersUnavailableError: the sweep will do it later.
        """
        snapshot = await self._tenants.snapshot(tenant_id)
        if snapshot.status is Status.DELETED:
            for key in await self._api_keys.snapshots(tenant_id):
                await self._counters.publish_key(key)
        await self._counters.publish_tenant(snapshot)
        if wait and any(spec.seeding for spec in snapshot.budgets):
            try:
                await self.give_past(tenant_id, patient=True)
            except (DependencyUnavailableError, CountersUnavailableError):
                logger.warning("new budgets of %s are enforced later", tenant_id, exc_info=True)

    async def give_past(self, tenant_id: str, *, patient: bool = False) -> bool:
        """Give new counters what the ledger has, then publish that they are enforced; ``False``: not yet.

        ``patient``: also when somebody else compares them at the moment.

        Raises:
            DependencyUnavailableError, CountersUnavailableError: to be done again.
        """
        # Again when a budget was changed meanwhile: it counts something else now.
        while (published := await self._counters.load_tenant(tenant_id)) is not None:
            seeding = [spec for spec in published.budgets if spec.seeding]
            if not seeding:
                return True
            comparison = await self._reconciler.compare(tenant_id, seeding_only=True, patient=patient)
            if not comparison.complete:
                return False
            if comparison.waiting:
                self._waiting.add(tenant_id)
            for spec in seeding:
                await self._budgets.mark_seeded(spec.budget_id, spec.spec_version)
            await self._counters.publish_tenant(await self._tenants.snapshot(tenant_id))
        return False

    async def publish_key(self, key_id: str) -> None:
        """Publish an API key.

        Raises:
            NotFoundError: there is no such key.
            DependencyUnavailableError, CountersUnavailableError: the sweep will do it later.
        """
        await self._counters.publish_key(await self._api_keys.snapshot(key_id))

    async def sweep(self, *, changed_within_s: float | None = None) -> int:
        """Publish every record that Redis lacks or has an older version of; returns how many.

        Keys go first: a tenant must not be known to Redis before the revocations that belong to it.
        """
        return await self._sweep_keys(changed_within_s) + await self._sweep_tenants(changed_within_s)

    async def _sweep_keys(self, changed_within_s: float | None) -> int:
        published, after = 0, ""
        while page := await self._api_keys.snapshots_after(after, limit=PAGE, changed_within_s=changed_within_s):
            versions = await self._published.key_versions([(key.tenant_id, key.key_id) for key in page])
            outdated: list[KeySnapshot] = [
                key for key, version in zip(page, versions, strict=True) if version is None or version < key.version
            ]
            for key in outdated:
                await self._counters.publish_key(key)
            published += len(outdated)
            after = page[-1].key_id
        return published

    async def _sweep_tenants(self, changed_within_s: float | None) -> int:
        published, after = 0, ""
        while page := await self._tenants.versions(after=after, limit=PAGE, changed_within_s=changed_within_s):
            standing = await self._published.tenant_versions([tenant_id for tenant_id, _ in page])
            for (tenant_id, version), known in zip(page, standing, strict=True):
                if known is None or known < version:
                    await self.publish(tenant_id, wait=False)
                    published += 1
            after = page[-1][0]
        return published


class PublishSnapshots:
    """The sweep as a job: what changed lately each time, everything now and then."""

    name = "publish_snapshots"
    interval_s = 1.0

    def __init__(self, publisher: SnapshotPublisher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._publisher = publisher
        self._clock = clock
        self._swept_at: float | None = None
        self._swept_fully_at: float | None = None

    async def run_once(self) -> bool:
        """Sweep once."""
        now = self._clock()
        full = self._swept_fully_at is None or now - self._swept_fully_at >= FULL_SWEEP_EVERY_S
        since_s = None if full or self._swept_at is None else now - self._swept_at + OVERLAP_S
        published = await self._publisher.sweep(changed_within_s=since_s)
        self._swept_at = now
        if full:
            self._swept_fully_at = now
        if published:
            logger.info("job=%s published=%d full=%s", self.name, published, full)
        return False
