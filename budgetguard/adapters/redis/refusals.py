"""Refused attempts on their way to Postgres: told by ext_authz, drained by the control plane."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.scripts import Script, ScriptRunner
from budgetguard.core.attempt_counts import (
    ROWS_WAITING_MAX,
    TALLIES_WAITING_MAX,
    UNTOLD_KEPT_MS,
    Report,
    Tally,
)
from budgetguard.core.attempts import MINUTE_MS, ROWS_A_MINUTE, RefusedCall, attempt_to_json
from budgetguard.core.events import MalformedEvent
from budgetguard.core.reasons import Reason

REFUSE = Script("refuse")
FORGET = Script("forget_refusals")

# Until no report of the minute can come any more: a process keeps for so long what it could not tell.
NUMBERS_KEPT_MS = UNTOLD_KEPT_MS + 5 * MINUTE_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What of a shard's refusals waits: entries of its stream by id, and counts, as they are in Redis, by name.

    ``more``: this is not all of it.
    """

    shard: int
    rows: Mapping[str, RefusedCall | MalformedEvent]
    counts: Mapping[str, str]
    more: bool


class Refusals:
    """The refusals of all shards of one Redis. Every method may raise ``CountersUnavailableError``."""

    def __init__(
        self, redis: RedisClient, *, rows_max: int = ROWS_WAITING_MAX, tallies_max: int = TALLIES_WAITING_MAX
    ) -> None:
        self._redis = redis
        self._scripts = ScriptRunner(redis)
        self._rows_max = rows_max
        self._tallies_max = tallies_max

    async def refuse(self, report: Report) -> bool:
        """Tell a report; the same one again changes nothing. ``False``: there is no room for it, tell it later."""
        tally = report.tally
        shard = keys.shard_of(tally.tenant_id)
        taken = await self._scripts.run(
            REFUSE,
            [
                keys.refusal_numbers(tally.tenant_id, tally.minute_ms),
                keys.refusal_counts(shard),
                keys.refusals(shard),
            ],
            [
                keys.refusal_group(tally.key_id, tally.reason.value),
                tally.source,
                _name_of(tally),
                report.count,
                report.first_number,
                ROWS_A_MINUTE,
                NUMBERS_KEPT_MS,
                self._rows_max,
                self._tallies_max,
                *map(attempt_to_json, report.attempts),
            ],
        )
        return bool(taken)

    async def waiting(self, shards: Sequence[int], *, rows: int, counts: int) -> list[Waiting]:
        """Read what waits: of each shard that has any, the oldest ``rows``, and about so many ``counts``.

        Nothing is taken: what is not forgotten is read again. All of it is one trip, and all streams are one command;
        Redis Cluster takes streams of one slot only: there, read shard by shard.
        """
        by_key = {keys.refusals(shard): shard for shard in shards}
        # The streams last: who reads a count has read the rows that came with it, too.
        *scanned, reply = await self._redis.pipeline(
            [
                *(("HSCAN", keys.refusal_counts(shard), 0, "COUNT", counts) for shard in shards),
                ("XREAD", "COUNT", rows, "STREAMS", *by_key, *("0-0" for _ in by_key)),
            ]
        )
        entries = {by_key[key]: of_shard for key, of_shard in reply or ()}
        waiting = []
        for shard, (cursor, pairs) in zip(shards, scanned, strict=True):
            of_shard = entries.get(shard, ())
            if of_shard or pairs:
                waiting.append(
                    Waiting(
                        shard=shard,
                        rows={entry_id: _row_of(fields) for entry_id, fields in of_shard},
                        # A scan may give a field twice.
                        counts=dict(zip(pairs[::2], pairs[1::2], strict=True)),
                        more=len(of_shard) >= rows or cursor != "0",
                    )
                )
        return waiting

    async def forget(self, waiting: Waiting) -> None:
        """Drop what Postgres has; a count that has risen meanwhile stays."""
        await self._scripts.run(
            FORGET,
            [keys.refusals(waiting.shard), keys.refusal_counts(waiting.shard)],
            [len(waiting.rows), *waiting.rows, *chain.from_iterable(waiting.counts.items())],
        )


def tally_of(name: str, value: str) -> tuple[Tally, int] | MalformedEvent:
    """Read a count as it is in Redis."""
    try:
        tenant_id, key_id, reason, minute_ms, source = keys.split_refusal_count(name)
        tally = Tally(
            tenant_id=tenant_id, key_id=key_id, reason=Reason(reason), minute_ms=int(minute_ms), source=source
        )
        return tally, int(value)
    except ValueError:
        return MalformedEvent({"name": name, "value": value})


def _name_of(tally: Tally) -> str:
    return keys.refusal_count(tally.tenant_id, tally.key_id, tally.reason.value, str(tally.minute_ms), tally.source)


def _row_of(pairs: Sequence[str]) -> RefusedCall | MalformedEvent:
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    try:
        return RefusedCall.from_fields(fields)
    except ValueError:
        return MalformedEvent(fields)
