"""ApiKeyService."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from budgetguard.core.api_key import format_api_key, hash_secret, parse_api_key
from budgetguard.core.entities import ApiKey, ApiKeyChanges, Page
from budgetguard.core.errors import InvalidError, NotPublishedError
from budgetguard.v1 import api_key_pb2, api_key_pb2_grpc
from control_plane.fields import etag_version, milliseconds, named_fields
from control_plane.messages import api_key_message
from control_plane.services import ACTOR

logger = logging.getLogger(__name__)


class ApiKeys(Protocol):
    """Where API keys are kept; see ``ApiKeyRepository`` for what each may raise."""

    async def create(
        self,
        *,
        actor: str,
        tenant_id: str,
        key_id: str,
        name: str,
        secret_sha256: str,
        request_id: str = "",
        requests_per_minute: int | None = None,
        expires_at_ms: int | None = None,
        tokens_per_minute: int | None = None,
        concurrent_calls: int | None = None,
        tags: tuple[str, ...] = (),
    ) -> ApiKey: ...
    async def get(self, key_id: str) -> ApiKey: ...
    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[ApiKey]: ...
    async def update(
        self, key_id: str, changes: ApiKeyChanges, *, actor: str, expected_version: int | None = None
    ) -> ApiKey: ...
    async def revoke(self, key_id: str, *, actor: str, expected_version: int | None = None) -> ApiKey: ...


class ApiKeyPublisher(Protocol):
    """Tells the data plane of a key; raises ``NotPublishedError``."""

    async def api_key(self, key_id: str) -> None: ...


class ApiKeyService(api_key_pb2_grpc.ApiKeyServiceServicer):
    """API keys. ``new_id`` and ``new_secret`` are the sources of randomness."""

    def __init__(
        self,
        *,
        api_keys: ApiKeys,
        publisher: ApiKeyPublisher,
        new_id: Callable[[], str],
        new_secret: Callable[[], bytes],
    ) -> None:
        self._api_keys = api_keys
        self._publisher = publisher
        self._new_id = new_id
        self._new_secret = new_secret

    async def CreateApiKey(
        self, request: api_key_pb2.CreateApiKeyRequest, _context: Any
    ) -> api_key_pb2.CreateApiKeyResponse:
        key_id = self._new_id()
        plaintext = format_api_key(tenant_id=request.tenant_id, key_id=key_id, secret=self._new_secret())
        parsed = parse_api_key(plaintext)
        if parsed is None:
            raise InvalidError("tenant_id", "expected 1 to 63 of a-z, 0-9 and inner hyphens")
        api_key = await self._api_keys.create(
            actor=ACTOR,
            tenant_id=request.tenant_id,
            key_id=key_id,
            # Keys of the first BudgetGuard had no names.
            name=request.name or key_id,
            secret_sha256=hash_secret(parsed.secret),
            request_id=request.request_id,
            requests_per_minute=request.rate_limit_per_min if request.HasField("rate_limit_per_min") else None,
            expires_at_ms=(
                milliseconds(request.expire_time, field="expire_time") if request.HasField("expire_time") else None
            ),
            tokens_per_minute=request.tokens_per_min if request.HasField("tokens_per_min") else None,
            concurrent_calls=request.concurrent_calls if request.HasField("concurrent_calls") else None,
            tags=tuple(request.tags),
        )
        published = True
        try:
            await self._publisher.api_key(api_key.key_id)
        except NotPublishedError:
            # An error would lose the plaintext for good, and without Redis no key admits anything anyway.
            logger.warning("key not published yet", extra={"key_id": api_key.key_id}, exc_info=True)
            published = False
        return api_key_pb2.CreateApiKeyResponse(
            id=api_key.key_id,
            key=plaintext if api_key.key_id == key_id else "",
            api_key=api_key_message(api_key),
            published=published,
        )

    async def GetApiKey(self, request: api_key_pb2.GetApiKeyRequest, _context: Any) -> api_key_pb2.ApiKey:
        return api_key_message(await self._api_keys.get(request.api_key_id))

    async def ListApiKeys(
        self, request: api_key_pb2.ListApiKeysRequest, _context: Any
    ) -> api_key_pb2.ListApiKeysResponse:
        page = await self._api_keys.list(request.tenant_id, page_size=request.page_size, page_token=request.page_token)
        return api_key_pb2.ListApiKeysResponse(
            api_keys=[api_key_message(api_key) for api_key in page.items], next_page_token=page.next_page_token
        )

    async def UpdateApiKey(self, request: api_key_pb2.UpdateApiKeyRequest, _context: Any) -> api_key_pb2.ApiKey:
        api_key = await self._api_keys.update(
            request.api_key_id, _changes(request), actor=ACTOR, expected_version=etag_version(request.etag)
        )
        await self._publisher.api_key(api_key.key_id)
        return api_key_message(api_key)

    async def RevokeApiKey(self, request: api_key_pb2.RevokeApiKeyRequest, _context: Any) -> api_key_pb2.ApiKey:
        api_key = await self._api_keys.revoke(
            request.api_key_id, actor=ACTOR, expected_version=etag_version(request.etag)
        )
        await self._publisher.api_key(api_key.key_id)
        return api_key_message(api_key)


def _changes(request: api_key_pb2.UpdateApiKeyRequest) -> ApiKeyChanges:
    named = named_fields(
        request, ("name", "rate_limit_per_min", "expire_time", "tokens_per_min", "concurrent_calls", "tags")
    )
    changes = ApiKeyChanges()
    if "name" in named:
        if not request.name:
            raise InvalidError("name", "expected a name")
        changes["name"] = request.name
    # Named but absent: cleared.
    if "rate_limit_per_min" in named:
        limited = request.HasField("rate_limit_per_min")
        changes["requests_per_minute"] = request.rate_limit_per_min if limited else None
    if "tokens_per_min" in named:
        changes["tokens_per_minute"] = request.tokens_per_min if request.HasField("tokens_per_min") else None
    if "concurrent_calls" in named:
        changes["concurrent_calls"] = request.concurrent_calls if request.HasField("concurrent_calls") else None
    if "tags" in named:
        changes["tags"] = tuple(request.tags)
    if "expire_time" in named:
        expires = request.HasField("expire_time")
        changes["expires_at_ms"] = milliseconds(request.expire_time, field="expire_time") if expires else None
    return changes
