"""What ext_proc reads from its environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from budgetguard.adapters.settings import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Frozen at start. ``spool_dir`` belongs to one process: give each its own."""

    address: str
    # Where Prometheus scrapes; ``None``: nowhere.
    metrics_address: str | None
    redis_url: str
    spool_dir: Path

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Settings":
        """Read and check.

        Raises:
            SettingsError: a value is missing or malformed.
        """
        environment = Environment(variables)
        return cls(
            address=environment.address("EXT_PROC_ADDRESS", "127.0.0.1:9102"),
            metrics_address=environment.host_port("EXT_PROC_METRICS_ADDRESS"),
            redis_url=environment.url("REDIS_URL", "redis://127.0.0.1:6379/0", schemes=("redis", "rediss", "unix")),
            spool_dir=environment.path("SPOOL_DIR", Path(".budgetguard/spool")),
        )
