"""Who calls: the tenant key out of the headers, and which credential goes on to the provider. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from budgetguard.core.api_key import ApiKeyText, parse_api_key, secret_matches
from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeySnapshot, KeyStatus, Status, TenantSnapshot

_BEARER = "bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A presented tenant key; ``upstream_authorization`` is the caller's own provider credential, to be passed on."""

    key: ApiKeyText
    upstream_authorization: str | None


def read_credentials(headers: Mapping[str, str]) -> Credentials | Deny:
    """Find the tenant key: in ``X-API-Key``, else in ``Authorization: Bearer``.

    Beside an ``X-API-Key`` an ``Authorization`` header is the caller's own provider key, unless it holds a tenant key
    (SDKs send theirs in both): that never goes upstream.
    """
    authorization = headers.get("authorization", "").strip()
    bearer = authorization[len(_BEARER) :].strip() if authorization.lower().startswith(_BEARER) else ""
    presented = headers.get("x-api-key", "").strip()
    # Whatever the scheme: a tenant key is the last word.
    is_ours = authorization.rpartition(" ")[2].startswith("bg_")
    upstream = authorization if presented and authorization and not is_ours else None
    text = presented or bearer
    if not text:
        return Deny(Reason.API_KEY_MISSING)
    key = parse_api_key(text)
    if key is None:
        return Deny(Reason.API_KEY_UNKNOWN)
    claimed = headers.get("x-tenant-id", "").strip()
    if claimed and claimed != key.tenant_id:
        return Deny(Reason.TENANT_MISMATCH)
    return Credentials(key=key, upstream_authorization=upstream)


def authenticate(
    credentials: Credentials, *, tenant: TenantSnapshot | None, key: KeySnapshot | None, now_ms: int
) -> Deny | None:
    """Check a presented key against the records; ``None`` when it is good.

    Only who knows the secret learns that a key is revoked or expired, or its tenant suspended.
    """
    if key is None or not secret_matches(secret=credentials.key.secret, secret_sha256=key.secret_sha256):
        return Deny(Reason.API_KEY_UNKNOWN)
    if key.status is KeyStatus.REVOKED or tenant is None or tenant.status is Status.DELETED:
        return Deny(Reason.API_KEY_REVOKED)
    if key.expires_at_ms is not None and now_ms >= key.expires_at_ms:
        return Deny(Reason.API_KEY_EXPIRED)
    if tenant.status is Status.SUSPENDED:
        return Deny(Reason.TENANT_SUSPENDED)
    return None
