"""Records refused attempts, beside the calls: no answer waits for it, and a flood of refusals is counted in here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import Counter

from budgetguard.adapters.redis.client import CountersUnavailableError, RedisReplyError
from budgetguard.core.attempt_counts import Gathering, Report
from budgetguard.core.attempts import Attempt, attempt_of
from budgetguard.core.context import SESSION_ID, TAGS, TAGS_HEADER_CHARS_MAX, TAGS_SENT_MAX, USER_ID, CallContext
from budgetguard.core.handoff import Handoff
from budgetguard.core.reasons import Deny
from budgetguard.core.snapshot import KeySnapshot
from ext_authz.call import IncomingCall

# A refusal is seen by an administrator this much later; a key in a loop costs Redis one script each time.
TELL_EVERY_SECONDS = 0.25
# How often Redis is asked whether it is the one that it was: one that is not may have lost what it was told.
WATCH_EVERY_MS = 1_000
# After Redis did not answer; meanwhile refusals are counted.
RETRY_SECONDS = 1.0
# What is left at the end may take this long.
DRAIN_SECONDS = 2.0

logger = logging.getLogger(__name__)

_DROPPED = Counter(
    "budgetguard_refusals_dropped", "Refused calls that are in no record: too many waited, or for too long."
)


@dataclass(slots=True)
class Seen:
    """What has become known of a call while it is decided.

    ``key`` is set once its secret was right: a stranger's refusals are nobody's. ``reserving`` has the hold that may
    exist, as soon as it is asked for.
    """

    key: KeySnapshot | None = None
    context: CallContext | None = None
    model: str = ""
    provider_id: str = ""
    reserving: list[Handoff] = field(default_factory=list)


class RefusalStore(Protocol):
    """Where refusals are told; raises ``CountersUnavailableError``."""

    async def refuse(self, report: Report) -> bool:
        """Take a report, the same one again without effect; ``False``: no room for now."""


class RefusalLog:
    """Counts refusals and tells them from time to time. ``source`` is a name that no other process has had.

    ``incarnation`` asks Redis which process it is and which data it has, ``None`` while that is being found out; it
    raises ``CountersUnavailableError``.
    """

    def __init__(
        self,
        store: RefusalStore,
        *,
        source: str,
        incarnation: Callable[[], Awaitable[str | None]],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._gathering = Gathering(source)
        self._incarnation = incarnation
        self._now_ms = now_ms
        # Which Redis it was when it was asked last, and when that was.
        self._known: str | None = None
        self._known_at_ms = 0
        # Refusals that were dropped and not logged yet.
        self._dropped = 0

    def record(self, deny: Deny, *, call: IncomingCall, api: str, seen: Seen) -> None:
        """Take note of a refusal, if its key was authenticated. Neither waits nor fails."""
        key, now_ms = seen.key, self._now_ms()
        if key is not None and not self._gathering.add(
            deny.reason,
            tenant_id=key.tenant_id,
            key_id=key.key_id,
            refused_at_ms=now_ms,
            make=lambda: _attempt(deny, call, key, api=api, seen=seen, now_ms=now_ms),
        ):
            self._drop(1)

    async def keep_telling(self) -> None:
        """Tell what was recorded until cancelled; while Redis is away it waits, within bounds."""
        while True:
            try:
                await self.watch()
                await self.tell()
            except Exception as error:  # noqa: BLE001 - the loop must outlive whatever Redis answers
                logger.warning("refusals not told yet: %r", error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(TELL_EVERY_SECONDS)
            self._drop(self._gathering.forget(self._now_ms(), same_until_ms=self._known_at_ms))
            if self._dropped:
                logger.error("%d refused calls are in no record", self._dropped)
                self._dropped = 0

    async def watch(self) -> None:
        """Notice that Redis is another now, or has lost its data: then the last counts are told again.

        Raises:
            CountersUnavailableError: what it was told is kept until it answers.
        """
        now_ms = self._now_ms()
        if now_ms - self._known_at_ms < WATCH_EVERY_MS:
            return
        incarnation = await self._incarnation()
        if incarnation is None:
            return
        if self._known not in (None, incarnation) and (again := self._gathering.tell_again()):
            logger.warning("Redis was replaced: telling %d counts of refusals again", again)
        self._known, self._known_at_ms = incarnation, now_ms

    async def tell(self) -> None:
        """Tell what was not told yet, one after the other: no burst ever stands before a call's own command.

        Raises:
            CountersUnavailableError: the rest is told another time.
        """
        fault: RedisReplyError | None = None
        for report in self._gathering.reports():
            try:
                if await self._store.refuse(report):
                    self._gathering.told(report, now_ms=self._now_ms())
            except RedisReplyError as error:
                fault = error  # it answers, so others may be taken
        if fault is not None:
            raise fault

    async def drain(self) -> None:
        """Tell the rest, if Redis takes it."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self.tell()
        except (CountersUnavailableError, TimeoutError) as error:
            logger.warning("refusals not told: %r", error)
        left = self._gathering.untold()
        if left:
            self._drop(left)
            logger.error("%d refused calls are in no record", left)

    def _drop(self, number: int) -> None:
        self._dropped += number
        _DROPPED.inc(number)


def _attempt(deny: Deny, call: IncomingCall, key: KeySnapshot, *, api: str, seen: Seen, now_ms: int) -> Attempt:
    context = seen.context or _as_sent(call)
    return attempt_of(
        deny,
        refused_at_ms=now_ms,
        tenant_id=key.tenant_id,
        key_id=key.key_id,
        operation_id=call.operation_id,
        api=api,
        provider_id=seen.provider_id,
        model=seen.model,
        tags=context.tags,
        session_id=context.session_id,
        end_user=context.end_user,
    )


def _as_sent(call: IncomingCall) -> CallContext:
    """Read a context that was refused, or not looked at, without judging it."""
    sent = call.headers.get(TAGS, "")[:TAGS_HEADER_CHARS_MAX].split(",")
    tags = dict.fromkeys(tag for part in sent if (tag := part.strip()))
    return CallContext(
        tags=tuple(tags)[:TAGS_SENT_MAX],
        session_id=call.headers.get(SESSION_ID, "").strip(),
        end_user=call.headers.get(USER_ID, "").strip(),
    )
