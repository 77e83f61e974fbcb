"""What a call says of itself in its headers: tags, session, end user; checked against the records of its caller.

Read from headers alone. A body's own ``user`` member belongs to the provider: apps have put there whatever the provider
takes, so it must neither refuse a call nor begin to count against a budget unasked.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from budgetguard.core.reasons import Deny, Reason
from budgetguard.core.snapshot import KeySnapshot, TenantSnapshot
from budgetguard.core.tags import TAG_ID_EXPECTED, TAG_ID_PATTERN, TagTree

TAGS, SESSION_ID, SESSION_NAME, SESSION_PATH, USER_ID = (
    "x-tags",
    "x-session-id",
    "x-session-name",
    "x-session-path",
    "x-user-id",
)
_SPELLED = {
    TAGS: "X-Tags",
    SESSION_ID: "X-Session-Id",
    SESSION_NAME: "X-Session-Name",
    SESSION_PATH: "X-Session-Path",
    USER_ID: "X-User-Id",
}

# All of it travels with the call, is kept with its hold and stands in its ledger row.
TEXT_CHARS_MAX = 200
TAGS_SENT_MAX = 16
TAGS_HEADER_CHARS_MAX = 4096
# Sent and fixed ones with all their ancestors.
TAGS_CARRIED_MAX = 64

# Tags and closed sessions that stay indexed, over all tenants, at about 200 bytes; what was indexed first leaves first.
INDEXED_MAX = 500_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """Whose spend a call is, beyond its key.

    ``tags`` are the ids of the call's tags, those fixed on its key included, and of all their ancestors, each once,
    sorted. What was not told is empty.
    """

    tags: tuple[str, ...] = ()
    session_id: str = ""
    session_name: str = ""
    session_path: str = ""
    end_user: str = ""


class _Index:
    """A tenant record's tags and closed sessions, ready to be looked up."""

    def __init__(self, tenant: TenantSnapshot) -> None:
        self.tenant = tenant
        self.tree = TagTree(tenant.tags)
        self.closed_sessions = frozenset(tenant.closed_sessions)
        # One more for itself, so that empty ones are bounded too.
        self.size = 1 + len(tenant.tags) + len(tenant.closed_sessions)


class Contexts:
    """Reads the contexts of calls. A tenant's record is indexed once, until there is another one of it."""

    def __init__(self) -> None:
        self._indexes: dict[str, _Index] = {}
        self._size = 0

    def read(
        self,
        headers: Mapping[str, str],
        *,
        tenant: TenantSnapshot,
        key: KeySnapshot,
        not_utf8: Collection[str] = (),
        repeated: Collection[str] = (),
    ) -> CallContext | Deny:
        """Make the context of a call; header names are in lower case. A refusal may come of records that are old.

        ``not_utf8`` names the headers whose bytes are no text, ``repeated`` those that came more than once. Taken for
        some text all the same, they would name whom nobody meant, and one could spend the budget of another.
        """
        unreadable = _unreadable(not_utf8, repeated) if not_utf8 or repeated else None
        if unreadable is not None:
            return unreadable
        texts: dict[str, str] = {}
        for name in (SESSION_ID, SESSION_NAME, SESSION_PATH, USER_ID):
            text = headers.get(name)
            if text is not None:
                texts[name] = text = text.strip()
                if not is_context_text(text):
                    return _invalid(name, f"at most {TEXT_CHARS_MAX} characters, none of them a control character")
        session_id = texts.get(SESSION_ID, "")
        if not session_id:
            for name in (SESSION_NAME, SESSION_PATH):
                if texts.get(name):
                    return _invalid(name, "it only beside an X-Session-Id")
        elif tenant.closed_sessions and session_id in self._index(tenant).closed_sessions:
            detail = f"Session {session_id!r} was deactivated."
            return Deny(Reason.SESSION_INACTIVE, detail, facts={"session_id": session_id}, param=_SPELLED[SESSION_ID])
        tags = self._tags(headers.get(TAGS, ""), tenant, key)
        if isinstance(tags, Deny):
            return tags
        return CallContext(
            tags=tags,
            session_id=session_id,
            session_name=texts.get(SESSION_NAME, ""),
            session_path=texts.get(SESSION_PATH, ""),
            end_user=texts.get(USER_ID, ""),
        )

    def _tags(self, header: str, tenant: TenantSnapshot, key: KeySnapshot) -> tuple[str, ...] | Deny:
        if not (header or key.tags or tenant.required_tags):
            return ()
        if len(header) > TAGS_HEADER_CHARS_MAX:
            return _invalid(TAGS, f"at most {TAGS_HEADER_CHARS_MAX} characters")
        sent = dict.fromkeys(tag for part in header.split(",") if (tag := part.strip()))
        if len(sent) > TAGS_SENT_MAX:
            return _invalid(TAGS, f"at most {TAGS_SENT_MAX} tags, got {len(sent)}")
        tree = self._index(tenant).tree
        carried: set[str] = set()
        for tag in (*key.tags, *sent):
            refused = _refused(tag, tree, is_fixed=tag in key.tags)
            if refused is not None:
                return refused
            carried.update(tree.line(tag))
        if len(carried) > TAGS_CARRIED_MAX:
            return _invalid(TAGS, f"at most {TAGS_CARRIED_MAX} tags with all tags above them, got {len(carried)}")
        missing = [tag for tag in tenant.required_tags if tag not in carried]
        if missing:
            return Deny(
                Reason.TAG_REQUIRED,
                f"X-Tags: expected each of {', '.join(tenant.required_tags)}, or a tag below it; "
                f"missing: {', '.join(missing)}.",
                facts={"missing_tags": ", ".join(missing)},
                param=_SPELLED[TAGS],
            )
        return tuple(sorted(carried))

    def _index(self, tenant: TenantSnapshot) -> _Index:
        known = self._indexes.get(tenant.tenant_id)
        if known is not None and known.tenant is tenant:
            return known
        fresh = _Index(tenant)
        self._size += fresh.size - (self._indexes.pop(tenant.tenant_id).size if known else 0)
        self._indexes[tenant.tenant_id] = fresh
        while self._size > INDEXED_MAX:
            self._size -= self._indexes.pop(next(iter(self._indexes))).size
        return fresh


def is_context_text(text: str) -> bool:
    """Whether a text may name a session or an end user, or tell of one: of any language, but bounded."""
    return len(text) <= TEXT_CHARS_MAX and not _CONTROL.search(text)


def _unreadable(not_utf8: Collection[str], repeated: Collection[str]) -> Deny | None:
    """Say which header tells nothing that can be relied on; ``None``: every one does."""
    for name in _SPELLED:
        if name in not_utf8:
            return _invalid(name, "UTF-8, got bytes that are none")
        if name in repeated and name != TAGS:
            return _invalid(name, "it once, got it several times")
    return None


def _refused(tag: str, tree: TagTree, *, is_fixed: bool) -> Deny | None:
    """Say why a call may not carry this tag; ``None``: it may."""
    where = "This API key" if is_fixed else _SPELLED[TAGS]
    param = None if is_fixed else _SPELLED[TAGS]
    if not TAG_ID_PATTERN.fullmatch(tag):
        return _invalid(TAGS, f"ids of tags, separated by commas: {TAG_ID_EXPECTED}; got {tag[:80]!r}")
    if tag not in tree:
        return Deny(Reason.TAG_UNKNOWN, f"{where}: there is no tag {tag!r}.", facts={"tag": tag}, param=param)
    inactive = tree.inactive(tag)
    if inactive is None:
        return None
    told = f"tag {tag!r} is inactive" if inactive == tag else f"tag {tag!r} is below {inactive!r}, which is inactive"
    return Deny(Reason.TAG_INACTIVE, f"{where}: {told}.", facts={"tag": tag, "inactive_tag": inactive}, param=param)


def _invalid(header: str, expected: str) -> Deny:
    return Deny(Reason.REQUEST_INVALID, f"{_SPELLED[header]}: expected {expected}.", param=_SPELLED[header])
