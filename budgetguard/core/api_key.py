"""Tenant API keys: ``bg_<tenant id>_<key id>_<secret>``. The key carries its tenant, so finding it costs no trip."""

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass

SECRET_BYTES = 32
# Tenant ids have no underscore, so the four parts split without ambiguity; the secret is base64url and may have one.
TENANT_ID_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
KEY_ID_PATTERN = re.compile(r"[a-z0-9]{16}")
_API_KEY_PATTERN = re.compile(
    rf"bg_(?P<tenant>{TENANT_ID_PATTERN.pattern})_(?P<key>{KEY_ID_PATTERN.pattern})_(?P<secret>[A-Za-z0-9_-]{{43}})"
)


@dataclass(frozen=True, slots=True)
class ApiKeyText:
    """A well-formed key, not yet checked against anything."""

    tenant_id: str
    key_id: str
    secret: str


def parse_api_key(text: str) -> ApiKeyText | None:
    """Split a presented key into its parts; ``None`` when it does not have the form of one of ours."""
    match = _API_KEY_PATTERN.fullmatch(text)
    if match is None:
        return None
    return ApiKeyText(tenant_id=match["tenant"], key_id=match["key"], secret=match["secret"])


def format_api_key(*, tenant_id: str, key_id: str, secret: bytes) -> str:
    """Spell the plaintext key that is shown once. ``secret`` is ``SECRET_BYTES`` of randomness."""
    return f"bg_{tenant_id}_{key_id}_{urlsafe_b64encode(secret).decode().rstrip('=')}"


def hash_secret(secret: str) -> str:
    """Hash the secret part for storage: SHA-256 in hex.

    A plain hash is enough because the secret has 256 random bits: there is no dictionary to try.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def secret_matches(*, secret: str, secret_sha256: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(hash_secret(secret), secret_sha256)


def tenant_id_from_name(name: str) -> str | None:
    """Make a tenant id (a slug) from a display name; ``None`` when nothing usable is left."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-")
    return slug or None
