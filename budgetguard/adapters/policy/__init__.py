"""The policy seam: one engine embedded, one a sidecar, the same policies and answers."""

from pathlib import Path

from budgetguard.adapters.policy.embedded import EmbeddedPolicy
from budgetguard.adapters.policy.opa import OpaPolicy
from budgetguard.core.policy import Policy


async def open_policy(*, opa_url: str | None, policy_dir: Path) -> Policy:
    """Open the engine that the settings name: a real OPA at ``opa_url``, or the embedded one with ``policy_dir``.

    An OPA that does not answer yet is not an error: decisions are unavailable until it does.

    Raises:
        PolicyLoadError: the policies or the URL cannot be used.
    """
    if opa_url is not None:
        return OpaPolicy(opa_url)
    return await EmbeddedPolicy.open(policy_dir)
