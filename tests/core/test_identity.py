from dataclasses import replace

import pytest

from budgetguard.core.api_key import format_api_key, hash_secret, parse_api_key
from budgetguard.core.identity import Credentials, authenticate, read_credentials
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeySnapshot, KeyStatus, Status, TenantSnapshot

KEY = format_api_key(tenant_id="acme", key_id="0123456789abcdef", secret=bytes(32))
PARSED = parse_api_key(KEY)
assert PARSED is not None
TENANT = TenantSnapshot(tenant_id="acme", version=1)
RECORD = KeySnapshot(
    tenant_id="acme", key_id="0123456789abcdef", version=1, secret_sha256=hash_secret(PARSED.secret), expires_at_ms=100
)


@pytest.mark.parametrize(
    ("headers", "upstream"),
    [
        ({"x-api-key": KEY}, None),
        ({"authorization": f"Bearer {KEY}"}, None),
        ({"authorization": f"bearer   {KEY} "}, None),
        ({"x-api-key": KEY, "authorization": "Bearer sk-proj-1"}, "Bearer sk-proj-1"),
        ({"x-api-key": KEY, "authorization": f"Bearer {KEY}"}, None),
        ({"x-api-key": KEY, "authorization": KEY}, None),
        ({"x-api-key": KEY, "authorization": f"Token {KEY}"}, None),
        ({"x-api-key": KEY, "authorization": "Bearer sk-bg_1"}, "Bearer sk-bg_1"),
        ({"x-api-key": KEY, "x-tenant-id": "acme"}, None),
    ],
)
def test_the_tenant_key_is_found_and_a_provider_key_passes_on(headers, upstream):
    found = read_credentials(headers)
    assert isinstance(found, Credentials)
    assert found.key == PARSED
    assert found.upstream_authorization == upstream


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, Reason.API_KEY_MISSING),
        ({"authorization": "Basic abc"}, Reason.API_KEY_MISSING),
        ({"authorization": "Bearer "}, Reason.API_KEY_MISSING),
        ({"x-api-key": " "}, Reason.API_KEY_MISSING),
        ({"authorization": "Bearer sk-proj-1"}, Reason.API_KEY_UNKNOWN),
        ({"x-api-key": "sk-proj-1", "authorization": f"Bearer {KEY}"}, Reason.API_KEY_UNKNOWN),
        ({"x-api-key": f"{KEY},{KEY}"}, Reason.API_KEY_UNKNOWN),
        ({"x-api-key": KEY, "x-tenant-id": "other"}, Reason.TENANT_MISMATCH),
    ],
)
def test_anything_else_is_refused(headers, reason):
    denied = read_credentials(headers)
    assert isinstance(denied, Deny)
    assert denied.reason is reason


@pytest.mark.parametrize(
    ("tenant", "key", "now_ms", "reason"),
    [
        (TENANT, RECORD, 99, None),
        (TENANT, RECORD, 100, Reason.API_KEY_EXPIRED),
        (TENANT, None, 0, Reason.API_KEY_UNKNOWN),
        (TENANT, replace(RECORD, secret_sha256="0" * 64), 0, Reason.API_KEY_UNKNOWN),
        (TENANT, replace(RECORD, status=KeyStatus.REVOKED), 0, Reason.API_KEY_REVOKED),
        (None, RECORD, 0, Reason.API_KEY_REVOKED),
        (replace(TENANT, status=Status.DELETED), RECORD, 0, Reason.API_KEY_REVOKED),
        (replace(TENANT, status=Status.SUSPENDED), RECORD, 0, Reason.TENANT_SUSPENDED),
        # Without the secret nothing is learned of the key's fate.
        (TENANT, replace(RECORD, status=KeyStatus.REVOKED, secret_sha256="0" * 64), 0, Reason.API_KEY_UNKNOWN),
    ],
)
def test_records_decide(tenant, key, now_ms, reason):
    credentials = Credentials(key=PARSED, upstream_authorization=None)
    denied = authenticate(credentials, tenant=tenant, key=key, now_ms=now_ms)
    assert (None if denied is None else denied.reason) is reason
