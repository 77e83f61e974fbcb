"""`budgetguard health TARGET`: whether a part answers, for container health checks."""

from pathlib import Path

from budgetguard.cli.local.envoy_admin import EnvoyAdmin
from budgetguard.cli.local.parts import is_serving

HELP = "TARGET: a program's gRPC address (unix:/path.sock or host:port), or envoy:/path.sock of Envoy's admin interface"
_ENVOY = "envoy:"


def is_healthy(target: str) -> bool:
    """Ask once."""
    if target.startswith(_ENVOY):
        return EnvoyAdmin(Path(target.removeprefix(_ENVOY))).is_live()
    return is_serving(target)
