"""Brings every settlement to Redis: at once if it answers, else by way of the spool, again if it came back older."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry

from budgetguard.adapters.redis.client import CountersUnavailableError, RedisReplyError
from budgetguard.core.budget import NotReady, Settled, Settlement
from ext_proc.metrics import DISK_FAILED, SPOOL_FULL, SettlementMetrics
from ext_proc.spool import Spool, SpoolFullError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A Redis that went down can come back without its last seconds (AOF everysec loses two at the most).
RECENT_SECONDS = 10.0
# Bounds the memory for them (about 2 KB each); over 2,000 calls a second, the oldest of the 10 s are let go.
RECENT_MAX = 20_000
WATCH_EVERY_SECONDS = 1.0
BACK_OFF_SECONDS_MIN = 0.1
BACK_OFF_SECONDS_MAX = 5.0
# An attempt ends by itself within the Redis client's timeout, and is spooled then.
CLOSE_SECONDS = 5.0


class Counters(Protocol):
    """What is needed of the budget counters. Raises ``CountersUnavailableError``."""

    async def settle(self, settlement: Settlement, *, now_ms: int) -> Settled | NotReady:
        """End an operation, once."""


class _Delivery(Enum):
    DONE = "done"
    # This one cannot be taken now, others may: the shard is being rebuilt, or Redis answered with an error.
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


class Settler:
    """Delivers settlements.

    ``incarnation`` asks Redis which process it is and which data it has, ``None`` while that is being found out; it
    raises ``CountersUnavailableError``. ``registry`` gets the metrics.
    """

    def __init__(
        self,
        counters: Counters,
        spool: Spool,
        *,
        incarnation: Callable[[], Awaitable[str | None]],
        now_ms: Callable[[], int],
        registry: CollectorRegistry | None = None,
        watch_every_seconds: float = WATCH_EVERY_SECONDS,
    ) -> None:
        self._counters = counters
        self._spool = spool
        self._incarnation = incarnation
        self._now_ms = now_ms
        self._watch_every_seconds = watch_every_seconds
        self._deliveries: set[asyncio.Task[None]] = set()
        self._background: list[asyncio.Task[None]] = []
        # Whether it is worth trying: false from a failure until the next sign of life.
        self._redis_answers = True
        self._recent: deque[tuple[float, Settlement]] = deque(maxlen=RECENT_MAX)
        self._unkept: list[Settlement] = []
        self._spool_turn = asyncio.Lock()
        # One thread: what the spool is asked for happens in order, also when whoever asked was cancelled.
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        self._spooled = asyncio.Event()
        self._metrics = SettlementMetrics(registry or CollectorRegistry())
        self._metrics.watch(
            waiting=lambda: spool.waiting,
            bytes_max=spool.bytes_max,
            redis_answers=lambda: self._redis_answers,
            now_ms=now_ms,
        )

    async def start(self) -> None:
        """Take the spool and deliver what an earlier process left in it.

        Raises:
            SpoolError: the spool cannot be used.
        """
        if await self._on_disk(self._spool.open):
            self._spooled.set()
        self._background = [asyncio.create_task(self._deliver_spooled()), asyncio.create_task(self._watch())]

    def submit(self, settlement: Settlement) -> asyncio.Task[None]:
        """Begin to settle, whatever becomes of the caller. The task ends when Redis or the disk has it; never fails."""
        self._metrics.ended(settlement.end)
        delivery = asyncio.create_task(self._deliver(settlement))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)
        return delivery

    async def close(self) -> None:
        """Wait until Redis or the disk has every settlement, and stop."""
        if self._deliveries:
            _, late = await asyncio.wait(self._deliveries, timeout=CLOSE_SECONDS)
            if late:
                logger.critical("%d settlements were not taken in time: their holds will expire", len(late))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._on_disk(self._spool.close)
        self._disk.shutdown()

    async def _on_disk(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function)

    async def _deliver(self, settlement: Settlement) -> None:
        if not self._redis_answers or await self._attempt(settlement) is not _Delivery.DONE:
            await self._keep([settlement])

    async def _attempt(self, settlement: Settlement) -> _Delivery:
        operation_id = settlement.handoff.facts.operation_id
        try:
            answer = await self._counters.settle(settlement, now_ms=self._now_ms())
        except RedisReplyError:
            logger.exception("Redis refused the settlement of %s", operation_id)
            return _Delivery.REFUSED
        except CountersUnavailableError as error:
            self._note_silence(error)
            return _Delivery.UNREACHABLE
        except Exception:  # a settlement must never be lost, whatever went wrong
            logger.exception("could not settle %s", operation_id)
            return _Delivery.REFUSED
        self._redis_answers = True
        if isinstance(answer, NotReady):
            return _Delivery.REFUSED
        self._recent.append((asyncio.get_running_loop().time(), settlement))
        return _Delivery.DONE

    def _note_silence(self, error: CountersUnavailableError) -> None:
        if self._redis_answers:
            logger.warning("settlements go to the spool: %s", error)
        self._redis_answers = False

    async def _keep(self, settlements: Sequence[Settlement]) -> None:
        """Put settlements on disk. Whoever gets the turn writes what all others wait with, in one go."""
        self._unkept += settlements
        async with self._spool_turn:
            batch, self._unkept = self._unkept, []
            if not batch:
                return
            try:
                await self._on_disk(partial(self._spool.append, batch))
            except OSError as error:
                operations = ", ".join(settlement.handoff.facts.operation_id for settlement in batch)
                logger.critical("neither Redis nor the spool takes settlements: %s; will expire: %s", error, operations)
                self._metrics.lost(len(batch), why=SPOOL_FULL if isinstance(error, SpoolFullError) else DISK_FAILED)
            else:
                self._metrics.spooled(len(batch))
        self._spooled.set()

    async def _deliver_spooled(self) -> None:
        """Empty the spool whenever there is something in it, patiently while Redis does not take it."""
        back_off_seconds = BACK_OFF_SECONDS_MIN
        while True:
            await self._spooled.wait()
            self._spooled.clear()
            try:
                emptied = await self._empty_spool()
            except OSError:
                logger.exception("the spool cannot be read")
                emptied = False
            if emptied:
                back_off_seconds = BACK_OFF_SECONDS_MIN
                continue
            self._spooled.set()
            await asyncio.sleep(back_off_seconds)
            back_off_seconds = min(2 * back_off_seconds, BACK_OFF_SECONDS_MAX)

    async def _empty_spool(self) -> bool:
        """Deliver what is in the spool now, in order; what is refused goes to its end. Say whether all was taken."""
        async with self._spool_turn:
            below = await self._on_disk(self._spool.seal)
        delivered_all = True
        while True:
            async with self._spool_turn:
                segment = await self._on_disk(partial(self._spool.oldest, below=below))
            if segment is None:
                return delivered_all
            refused = []
            for settlement in segment.settlements:
                delivery = await self._attempt(settlement)
                if delivery is _Delivery.UNREACHABLE:
                    return False
                if delivery is _Delivery.REFUSED:
                    refused.append(settlement)
            async with self._spool_turn:
                await self._on_disk(partial(self._spool.remove, segment, put_back=refused))
            delivered_all = delivered_all and not refused
            if segment.damaged:
                self._metrics.damaged(len(segment.damaged))
            if delivered := len(segment.settlements) - len(refused):
                self._metrics.delivered(delivered)
                logger.info("delivered %d spooled settlements", delivered)

    async def _watch(self) -> None:
        """Notice that Redis is another now, or has lost its data: it may lack the last settlements."""
        known: str | None = None
        while True:
            try:
                incarnation = await self._incarnation()
            except CountersUnavailableError as error:
                self._note_silence(error)
            else:
                self._redis_answers = True
                if incarnation is not None:
                    if known not in (None, incarnation):
                        await self._settle_again()
                    known = incarnation
                    self._forget_settled()
            await asyncio.sleep(self._watch_every_seconds)

    async def _settle_again(self) -> None:
        again = [settlement for _, settlement in self._recent]
        self._recent.clear()
        if again:
            logger.warning("Redis was replaced: settling the last %d calls again", len(again))
            await self._keep(again)

    def _forget_settled(self) -> None:
        """Let go of what is old enough. Only while Redis has its data: an outage does not age what came before."""
        oldest_kept = asyncio.get_running_loop().time() - RECENT_SECONDS
        while self._recent and self._recent[0][0] < oldest_kept:
            self._recent.popleft()
