"""Frees the holds of calls that were never forwarded: at once if Redis takes it, else again and again.

A release is right however late it comes: RELEASED replaces the EXPIRED that a lease runs out to, in Redis while that
end is remembered and in the ledger for ever. So what bounds it is memory, not the lease: docs/decisions/032.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Protocol

from prometheus_client import Counter, Gauge

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import CountersUnavailableError, RedisReplyError
from budgetguard.core.budget import NotReady, Settled
from budgetguard.core.handoff import Handoff

logger = logging.getLogger(__name__)

# About 2 KB each. The first to wait are kept: those of calls that Redis was deciding when it went away. Later ones
# hold only if a silent Redis comes back within a second of their reserve, which is refused as too late after that.
WAITING_MAX = 20_000
# Longer than an outage lasts; what Redis refuses for longer it refuses for ever.
AGE_MS_MAX = 24 * 60 * 60 * 1000
BACK_OFF_SECONDS_MIN = 0.1
BACK_OFF_SECONDS_MAX = 2.0
# At the same time: more would stand before the calls' own commands, fewer would wait for the loop's turns.
BATCH = 32
# What is left at the end may take this long.
DRAIN_SECONDS = 5.0

# Why a release was lost.
FULL = "full"
TOO_OLD = "too_old"
STOPPED = "stopped"

_WAITING = Gauge(
    "budgetguard_releases_waiting", "Holds of calls that were not forwarded, which Redis did not free yet."
)
_LOST = Counter(
    "budgetguard_releases_lost",
    "Holds of calls that were not forwarded, which are not tried to be freed any more: they expire, at the whole hold.",
    ("why",),
)
# Every series is there from the start, so that its first rise is one.
_LOST_BY = {why: _LOST.labels(why) for why in (FULL, TOO_OLD, STOPPED)}


class Counters(Protocol):
    """What is needed of the counters; raises ``CountersUnavailableError``."""

    async def release(
        self, handoff: Handoff, *, now_ms: int, ended_at_ms: int, status: int, detail: str
    ) -> Settled | NotReady:
        """Free a hold of a call that was never forwarded; a hold that is not there yet is refused when it comes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Release:
    handoff: Handoff
    detail: str
    ended_at_ms: int

    @property
    def operation_id(self) -> str:
        return self.handoff.facts.operation_id

    @property
    def shard(self) -> int:
        return keys.shard_of(self.handoff.facts.tenant_id)


class _Attempt(Enum):
    TAKEN = "taken"
    # This one cannot be taken now, others may: the shard is not signed off, or Redis answered with an error.
    REFUSED = "refused"
    SILENT = "silent"


class Releases:
    """Holds to be freed. ``now_ms`` is the clock, in Unix milliseconds."""

    def __init__(self, counters: Counters, *, now_ms: Callable[[], int], waiting_max: int = WAITING_MAX) -> None:
        self._counters = counters
        self._now_ms = now_ms
        self._waiting_max = waiting_max
        self._first_attempts: set[asyncio.Task[None]] = set()
        # Those whose first attempt failed, in the order in which they are tried again; the values say nothing.
        self._waiting: dict[_Release, None] = {}
        self._retrying: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many were tried and have to be tried again."""
        return len(self._waiting)

    def submit(self, handoff: Handoff, *, detail: str) -> None:
        """Begin to free a hold that may exist, whatever becomes of the caller."""
        release = _Release(handoff, detail, ended_at_ms=self._now_ms())
        attempt = asyncio.get_running_loop().create_task(self._try_first(release))
        self._first_attempts.add(attempt)
        attempt.add_done_callback(self._first_attempts.discard)

    async def drain(self) -> None:
        """Free what can be freed before the process ends. The rest will expire."""
        if self._first_attempts:
            # Each ends by itself within the Redis client's timeout.
            await asyncio.wait(self._first_attempts)
        if self._retrying is not None:
            self._retrying.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._waiting:
                    if not await self._try_again():
                        await asyncio.sleep(BACK_OFF_SECONDS_MIN)
        self._lose(list(self._waiting), STOPPED)

    async def _try_first(self, release: _Release) -> None:
        if await self._attempt(release) is _Attempt.TAKEN:
            return
        if len(self._waiting) >= self._waiting_max:
            self._lose([release], FULL)
            return
        self._waiting[release] = None
        _WAITING.set(len(self._waiting))
        if self._retrying is None or self._retrying.done():
            self._retrying = asyncio.create_task(self._keep_trying())

    async def _keep_trying(self) -> None:
        """Try until none waits, patiently while none is taken."""
        back_off_seconds = BACK_OFF_SECONDS_MIN
        while self._waiting:
            await asyncio.sleep(back_off_seconds)
            taken = await self._try_again()
            back_off_seconds = BACK_OFF_SECONDS_MIN if taken else min(2 * back_off_seconds, BACK_OFF_SECONDS_MAX)

    async def _try_again(self) -> int:
        """Try all that wait, as long as Redis answers; say how many it took.

        A shard that refuses one is left alone until the next time, and what was refused goes to the end: what is
        refused for long costs little, and nothing else waits for it.
        """
        oldest_ms = self._now_ms() - AGE_MS_MAX
        self._lose([release for release in self._waiting if release.ended_at_ms < oldest_ms], TOO_OLD)
        refusing: set[int] = set()
        left = (release for release in list(self._waiting) if release.shard not in refusing)
        taken = 0
        while batch := list(islice(left, BATCH)):
            attempts = await asyncio.gather(*(self._attempt(release) for release in batch))
            for release, attempt in zip(batch, attempts, strict=True):
                if attempt is _Attempt.TAKEN:
                    del self._waiting[release]
                    taken += 1
                elif attempt is _Attempt.REFUSED:
                    self._waiting[release] = self._waiting.pop(release)
                    refusing.add(release.shard)
            _WAITING.set(len(self._waiting))
            if _Attempt.SILENT in attempts:
                break
        if taken:
            logger.info("freed %d holds that Redis had not taken before", taken)
        return taken

    async def _attempt(self, release: _Release) -> _Attempt:
        try:
            answer = await self._counters.release(
                release.handoff,
                now_ms=self._now_ms(),
                ended_at_ms=release.ended_at_ms,
                status=0,
                detail=release.detail,
            )
        except RedisReplyError as error:
            logger.warning("Redis refused the release of %s: %s", release.operation_id, error)
            return _Attempt.REFUSED
        except CountersUnavailableError:
            return _Attempt.SILENT
        except Exception:  # a hold must never be forgotten, whatever went wrong
            logger.exception("could not release %s", release.operation_id)
            return _Attempt.REFUSED
        return _Attempt.REFUSED if isinstance(answer, NotReady) else _Attempt.TAKEN

    def _lose(self, releases: Iterable[_Release], why: str) -> None:
        lost = list(releases)
        if not lost:
            return
        for release in lost:
            self._waiting.pop(release, None)
        _WAITING.set(len(self._waiting))
        _LOST_BY[why].inc(len(lost))
        logger.error(
            "%d holds not released (%s), they will expire: %s",
            *(len(lost), why, ", ".join(release.operation_id for release in lost)),
        )
