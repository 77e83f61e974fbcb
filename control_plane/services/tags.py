"""TagService."""

from typing import Any, Protocol

from budgetguard.core.entities import Page, Tag, TagChanges, TagStatus
from budgetguard.core.errors import InvalidError
from budgetguard.v1 import tag_pb2, tag_pb2_grpc
from control_plane.fields import etag_version, named_fields
from control_plane.messages import TAG_STATUSES_BACK, tag_message
from control_plane.services import ACTOR


class Tags(Protocol):
    """Where tags are kept; see ``TagRepository`` for what each may raise."""

    async def create(
        self, *, actor: str, tenant_id: str, tag_id: str, name: str, parent_id: str = "", request_id: str = ""
    ) -> Tag: ...
    async def get(self, tenant_id: str, tag_id: str) -> Tag: ...
    async def list(self, tenant_id: str, *, page_size: int = 0, page_token: str = "") -> Page[Tag]: ...
    async def update(
        self, tenant_id: str, tag_id: str, changes: TagChanges, *, actor: str, expected_version: int | None = None
    ) -> Tag: ...
    async def move(
        self, tenant_id: str, tag_id: str, *, parent_id: str, actor: str, expected_version: int | None = None
    ) -> Tag: ...


class TenantPublisher(Protocol):
    """Tells the data plane of a tenant and its tags; raises ``NotPublishedError``."""

    async def tenant(self, tenant_id: str) -> None: ...


class TagService(tag_pb2_grpc.TagServiceServicer):
    """Tags."""

    def __init__(self, *, tags: Tags, publisher: TenantPublisher) -> None:
        self._tags = tags
        self._publisher = publisher

    async def CreateTag(self, request: tag_pb2.CreateTagRequest, _context: Any) -> tag_pb2.Tag:
        tag = await self._tags.create(
            actor=ACTOR,
            tenant_id=request.tenant_id,
            tag_id=request.tag_id,
            name=request.name or request.tag_id,
            parent_id=request.parent_id,
            request_id=request.request_id,
        )
        return await self._published(tag)

    async def GetTag(self, request: tag_pb2.GetTagRequest, _context: Any) -> tag_pb2.Tag:
        return tag_message(await self._tags.get(request.tenant_id, request.tag_id))

    async def ListTags(self, request: tag_pb2.ListTagsRequest, _context: Any) -> tag_pb2.ListTagsResponse:
        page = await self._tags.list(request.tenant_id, page_size=request.page_size, page_token=request.page_token)
        return tag_pb2.ListTagsResponse(
            tags=[tag_message(tag) for tag in page.items], next_page_token=page.next_page_token
        )

    async def UpdateTag(self, request: tag_pb2.UpdateTagRequest, _context: Any) -> tag_pb2.Tag:
        return await self._update(request, _changes(request))

    async def MoveTag(self, request: tag_pb2.MoveTagRequest, _context: Any) -> tag_pb2.Tag:
        # The empty id makes it a root, so a forgotten one must not.
        if not request.HasField("parent_id"):
            raise InvalidError("parent_id", 'expected the id of a tag, or "" for the root')
        tag = await self._tags.move(
            request.tenant_id,
            request.tag_id,
            parent_id=request.parent_id,
            actor=ACTOR,
            expected_version=etag_version(request.etag),
        )
        return await self._published(tag)

    async def DeleteTag(self, request: tag_pb2.DeleteTagRequest, _context: Any) -> tag_pb2.Tag:
        return await self._update(request, TagChanges(status=TagStatus.INACTIVE))

    async def _update(
        self, request: tag_pb2.UpdateTagRequest | tag_pb2.DeleteTagRequest, changes: TagChanges
    ) -> tag_pb2.Tag:
        tag = await self._tags.update(
            request.tenant_id, request.tag_id, changes, actor=ACTOR, expected_version=etag_version(request.etag)
        )
        return await self._published(tag)

    async def _published(self, tag: Tag) -> tag_pb2.Tag:
        await self._publisher.tenant(tag.tenant_id)
        return tag_message(tag)


def _changes(request: tag_pb2.UpdateTagRequest) -> TagChanges:
    named = named_fields(request, ("name", "status"))
    changes = TagChanges()
    if "name" in named:
        if not request.name:
            raise InvalidError("name", "expected a name")
        changes["name"] = request.name
    if "status" in named:
        status = TAG_STATUSES_BACK.get(request.status)
        if status is None:
            raise InvalidError("status", "expected ACTIVE or INACTIVE")
        changes["status"] = status
    return changes
