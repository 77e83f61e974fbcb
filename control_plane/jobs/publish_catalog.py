"""Brings providers and prices to the data plane: clusters to Envoy's file first, then the record to Redis."""

import asyncio
import logging
from pathlib import Path

from budgetguard.adapters.postgres.catalog import CatalogRepository
from budgetguard.adapters.redis.counters import Counters
from control_plane.jobs.clusters import clusters_file, find_ca_bundle, write_clusters

logger = logging.getLogger(__name__)


class PublishCatalog:
    """Publishes what is newer; a provider's cluster exists before a call can be sent to it.

    ``clusters_path`` ``None``: Envoy gets its clusters elsewhere. ``ca_bundle`` names the file of certificate
    authorities; without one the system's is found.
    """

    name = "publish_catalog"
    interval_s = 1.0

    def __init__(
        self,
        catalog: CatalogRepository,
        counters: Counters,
        *,
        clusters_path: Path | None,
        ca_bundle: str | None = None,
    ) -> None:
        self._catalog = catalog
        self._counters = counters
        self._clusters_path = clusters_path
        self._ca_bundle = ca_bundle
        self._one_at_a_time = asyncio.Lock()
        self._written_version: int | None = None

    async def run_once(self) -> bool:
        """Publish once; a change's RPC calls it too, to answer when the change is out."""
        async with self._one_at_a_time:
            catalog = await self._catalog.catalog()
            path = self._clusters_path
            if path is not None and (catalog.version != self._written_version or not path.exists()):
                text = clusters_file(
                    catalog.providers, version=catalog.version, ca_bundle=find_ca_bundle(self._ca_bundle)
                )
                if await asyncio.to_thread(write_clusters, path, text):
                    logger.info("job=%s clusters=%d version=%d", self.name, len(catalog.providers), catalog.version)
                self._written_version = catalog.version
            if await self._counters.publish_catalog(catalog.to_json(), version=catalog.version):
                logger.info("job=%s version=%d", self.name, catalog.version)
        return False
