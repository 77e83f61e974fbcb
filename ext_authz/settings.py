"""What ext_authz reads from its environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from budgetguard.adapters.settings import Environment

POLICY_DENY = "deny"
POLICY_SKIP = "skip"

# Names under which a provider's key may be given, besides the one that its row names.
_PROVIDER_KEY_ALIASES = {"OPENAI_API_KEY": ("OPENAI_KEY",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Frozen at start.

    ``variables`` keeps the environment for provider keys: a provider's row names the variable that holds its key, so
    that no secret is ever in Postgres or Redis.
    """

    address: str
    # Where Prometheus scrapes; ``None``: nowhere.
    metrics_address: str | None
    # Where ext_proc listens, to admit no call without it; ``None``: it is not watched.
    ext_proc_address: str | None
    redis_url: str
    opa_url: str | None
    policy_dir: Path
    policy_failure: str
    variables: Mapping[str, str]

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Settings":
        """Read and check.

        Raises:
            SettingsError: a value is missing or malformed.
        """
        environment = Environment(variables)
        return cls(
            address=environment.address("EXT_AUTHZ_ADDRESS", "127.0.0.1:9101"),
            metrics_address=environment.host_port("EXT_AUTHZ_METRICS_ADDRESS"),
            ext_proc_address=(
                environment.address("EXT_PROC_ADDRESS") if environment.optional("EXT_PROC_ADDRESS") else None
            ),
            redis_url=environment.url("REDIS_URL", "redis://127.0.0.1:6379/0", schemes=("redis", "rediss", "unix")),
            opa_url=environment.optional("OPA_URL"),
            policy_dir=environment.path("POLICY_DIR", Path("policies")),
            policy_failure=environment.choice("POLICY_FAILURE", (POLICY_DENY, POLICY_SKIP), POLICY_DENY),
            variables=dict(variables),
        )

    def provider_key(self, variable: str) -> str | None:
        """Return the provider key that ``variable`` (or one of its aliases) holds; ``None`` when it is not set."""
        for name in (variable, *_PROVIDER_KEY_ALIASES.get(variable, ())):
            if value := self.variables.get(name, "").strip():
                return value
        return None
