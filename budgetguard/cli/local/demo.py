"""What a first visitor needs: a provider to call, and a tenant with a key and a budget. By the public API."""

import json
from dataclasses import dataclass

from budgetguard.cli.local.admin import AdminClient, AdminError
from budgetguard.cli.local.home import Home
from budgetguard.core.api_key import parse_api_key

PROVIDER = "openai"
OPENAI_URL = "https://api.openai.com"
TENANT = "demo"
BUDGET_USD = "25"
MODEL = "gpt-4o-mini"
_KEY_FILE = "demo-key"
# Remembers that calls were pointed at the fake provider, so that only then are they pointed back.
_FAKE_FILE = "fake-provider-url"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A tenant that may call, with its plaintext key."""

    tenant_id: str
    api_key: str

    def curl(self, base_url: str) -> str:
        """Spell a call that works when pasted into a shell."""
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]})
        return (
            f"curl -i {base_url}/v1/chat/completions \\\n"
            f"  -H 'Authorization: Bearer {self.api_key}' \\\n"
            f"  -H 'Content-Type: application/json' \\\n"
            f"  -d '{body}'"
        )


def ensure_provider(admin: AdminClient, home: Home, *, fake_provider_url: str | None) -> str:
    """Have calls go to the fake provider, or, when they went there last time, to the real one again; return where.

    Raises:
        AdminError: the control plane refused.
    """
    rows = {row["providerId"]: row for row in admin.ask("GET", "/v1/admin/providers").get("providers", ())}
    row = rows.get(PROVIDER)
    base_url = str(row["baseUrl"]) if row else None
    if fake_provider_url is not None:
        if base_url is not None and base_url not in (OPENAI_URL, home.read_secret(_FAKE_FILE)):
            return base_url  # Somebody chose another upstream: theirs, not ours to change.
        home.write_secret(_FAKE_FILE, fake_provider_url)
        wanted = fake_provider_url
    elif base_url is None or base_url == home.read_secret(_FAKE_FILE):
        wanted = OPENAI_URL
    else:
        return base_url
    body = {"kind": "openai", "baseUrl": wanted, "apiKeyEnv": "OPENAI_API_KEY", "enabled": True}
    admin.ask("PUT", f"/v1/admin/providers/{PROVIDER}", body)
    return wanted


def ensure_demo(admin: AdminClient, home: Home) -> Demo | None:
    """Return the demo tenant, making it or a new key for it when missing; ``None`` when somebody deleted it.

    Raises:
        AdminError: the control plane refused.
    """
    try:
        admin.ask("GET", f"/v1/admin/tenants/{TENANT}")
    except AdminError as error:
        if error.status != 404:
            raise
        try:
            admin.ask("POST", "/admin/tenant", {"name": TENANT})
        except AdminError as refused:
            if refused.status == 409:
                return None
            raise
        budgets = {"budgets": [{"period": "monthly", "amountUsd": BUDGET_USD}]}
        admin.ask("POST", f"/admin/tenant/{TENANT}/budgets", budgets)
    kept = home.read_secret(_KEY_FILE)
    parsed = parse_api_key(kept) if kept else None
    keys = admin.ask("GET", f"/admin/tenant/{TENANT}/apikeys").get("apiKeys", ())
    if kept and parsed and any(key["id"] == parsed.key_id and key.get("status") == "ACTIVE" for key in keys):
        return Demo(tenant_id=TENANT, api_key=kept)
    api_key = str(admin.ask("POST", f"/admin/tenant/{TENANT}/apikeys", {})["key"])
    home.write_secret(_KEY_FILE, api_key)
    return Demo(tenant_id=TENANT, api_key=api_key)
