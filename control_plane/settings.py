"""What the control plane reads from its environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from budgetguard.adapters.settings import Environment

# Below this a key could be guessed; `budgetguard up` makes one of 32 random bytes.
ADMIN_KEY_BYTES_MIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Frozen at start. Without ``edge_clusters_path`` no clusters are written.

    ``ca_bundle`` is the file of certificate authorities that Envoy checks providers against; without it, the system's.
    """

    address: str
    database_url: str
    redis_url: str
    admin_key: str
    edge_clusters_path: Path | None
    ca_bundle: str | None

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Settings":
        """Read and check.

        Raises:
            SettingsError: a value is missing or malformed.
        """
        environment = Environment(variables)
        return cls(
            address=environment.address("CONTROL_PLANE_ADDRESS", "127.0.0.1:9103"),
            database_url=environment.url("DATABASE_URL", schemes=("postgresql", "postgres")),
            redis_url=environment.url("REDIS_URL", "redis://127.0.0.1:6379/0", schemes=("redis", "rediss", "unix")),
            admin_key=environment.secret("ADMIN_API_KEY", bytes_min=ADMIN_KEY_BYTES_MIN),
            edge_clusters_path=environment.path("EDGE_CLUSTERS_PATH")
            if environment.optional("EDGE_CLUSTERS_PATH")
            else None,
            ca_bundle=environment.optional("EDGE_CA_BUNDLE"),
        )
