import asyncio
import random
from dataclasses import replace
from itertools import permutations, product

import asyncpg
import orjson
import pytest

from budgetguard.adapters.postgres import dead_events as module
from budgetguard.adapters.postgres import ledger as ledger_module
from budgetguard.adapters.postgres.dead_events import DeadEventRepository
from budgetguard.adapters.postgres.ledger import DeadEvent, Inserted
from budgetguard.adapters.postgres.ledger_sums import LedgerSums
from budgetguard.adapters.postgres.migrate import downgrade, migrate
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.adapters.redis.keys import shard_of
from budgetguard.core.dead_events import DeadEventFilter, DeadEventState
from budgetguard.core.errors import (
    DeadEventRefusedError,
    DeadEventResolvedError,
    DependencyUnavailableError,
    InvalidError,
    NotFoundError,
)
from budgetguard.core.operation import End
from budgetguard.core.snapshot import SubjectKind
from tests.plugins.usage_events import a_delivery, an_event

ACME, OTHER = shard_of("acme"), shard_of("other")
STANDING = DeadEventFilter(state=DeadEventState.STANDING)
REFUSING = "ALTER TABLE usage_ledger ADD CONSTRAINT refusing CHECK (operation_id NOT LIKE 'dead%') NOT VALID"
MENDED = "ALTER TABLE usage_ledger DROP CONSTRAINT refusing"


@pytest.fixture
async def tenants(database):
    tenants = TenantRepository(database)
    for tenant_id in ("acme", "other"):
        await tenants.create(actor="admin", tenant_id=tenant_id, name=tenant_id)
    return tenants


@pytest.fixture
def dead_events(database, tenants):
    return DeadEventRepository(database)


@pytest.fixture
def spent(ledger):
    async def sum_of(tenant_id="acme"):
        return await ledger.spent(
            tenant_id=tenant_id, subject_kind=SubjectKind.TENANT, subject="", from_ms=0, until_ms=None
        )

    return sum_of


async def put_aside(ledger, *events, event_id="5-0", shard=ACME, error="malformed"):
    """Put events aside as the drain does; returns the id of the first."""
    milliseconds = int(event_id.partition("-")[0])
    dead = [
        DeadEvent(
            shard=shard,
            event_id=f"{milliseconds + number}-0",
            fields=event if isinstance(event, dict) else event.to_fields(),
            error=error,
        )
        for number, event in enumerate(events)
    ]
    await ledger.insert_events([], dead=dead)
    return f"{shard}-{event_id}"


async def audited(owner):
    rows = await owner.fetch("SELECT * FROM admin_audit WHERE kind = 'dead event' ORDER BY audit_id")
    return [(row["action"], row["resource_id"], row["tenant_id"], orjson.loads(row["after"])) for row in rows]


@pytest.mark.parametrize(
    ("shard", "fields", "tenant_id"),
    [
        (ACME, an_event().to_fields(), "acme"),
        (ACME, {"facts": '{"tenant_id":"acme"}'}, "acme"),
        (ACME, {"facts": '{"tenant_id":"acme","model":"\\u0000"}', "x": "\x00"}, "acme"),
        (ACME, {"facts": '{"tenant_id":"other"}'}, ""),  # of another shard
        (shard_of("nobody"), {"facts": '{"tenant_id":"nobody"}'}, ""),  # of nobody
        (ACME, {"facts": '{"tenant_id":"ac\\u0000me"}'}, ""),
        (ACME, {"facts": '{"tenant_id":'}, ""),
        (ACME, {"nonsense": "x"}, ""),
        (ACME, {}, ""),
    ],
)
async def test_whose_it_is_is_known_when_it_tells_a_tenant_of_its_shard(
    dead_events, ledger, database, shard, fields, tenant_id
):
    dead_event_id = await put_aside(ledger, fields, shard=shard)
    dead = await dead_events.get(dead_event_id)
    assert (dead.tenant_id, dead.fields, dead.state) == (tenant_id, fields, DeadEventState.STANDING)
    assert (dead.error, dead.reason, dead.resolved_at_ms) == ("malformed", "", None)
    sums = LedgerSums(database)
    assert await sums.has_dead_events("acme", shard=shard)  # its own, or perhaps its own
    assert await sums.has_dead_events("its-neighbour", shard=shard) == (tenant_id == "")
    assert not await sums.has_dead_events("acme", shard=(shard + 1) % 256)


async def test_what_was_refused_is_written_when_the_cause_is_mended(dead_events, ledger, owner, spent):
    await owner.execute(REFUSING)
    good, dead = a_delivery("op-1", delta_nanos=5), a_delivery("dead", shard=ACME, event_id="7-0", delta_nanos=60)
    inserted = await ledger.insert_events([good, dead])
    assert (inserted.rows, inserted.dead) == (1, 1)
    (standing,) = (await dead_events.list(STANDING)).items
    assert standing.dead_event_id == f"{ACME}-7-0"
    assert standing.error == "refused by the ledger: CheckViolationError"

    with pytest.raises(DeadEventRefusedError) as refused:
        await dead_events.retry(standing.dead_event_id, actor="a")
    assert refused.value.metadata["error"] == "refused by the ledger: CheckViolationError"
    assert await dead_events.get(standing.dead_event_id) == standing
    assert (await spent(), await audited(owner)) == (5, [])

    await owner.execute(MENDED)
    retried = await dead_events.retry(standing.dead_event_id, actor="a")
    assert (retried.state, retried.tenant_id) == (DeadEventState.RETRIED, "acme")
    assert retried.resolved_at_ms is not None
    assert await spent() == 65
    row = await owner.fetchrow("SELECT shard, event_id FROM usage_ledger WHERE operation_id = 'dead'")
    assert (row["shard"], row["event_id"]) == (ACME, "7-0"), "sums up to an event count it where it happened"
    assert await audited(owner) == [("retry", retried.dead_event_id, "acme", {"state": "RETRIED", "reason": ""})]
    assert (await ledger.alarms())["dead_events"] == 0


async def test_one_that_nobody_can_read_stands_until_it_is_discarded(dead_events, ledger, owner):
    dead_event_id = await put_aside(ledger, {"facts": '{"tenant_id":"acme","unheard-of":1}', "x": "\x00"})
    with pytest.raises(DeadEventRefusedError) as refused:
        await dead_events.retry(dead_event_id, actor="a")
    assert refused.value.metadata["error"] == "malformed"
    assert (await ledger.alarms())["dead_events"] == 1
    discarded = await dead_events.discard(dead_event_id, reason="a test's", actor="a")
    assert (discarded.state, discarded.reason) == (DeadEventState.DISCARDED, "a test's")
    assert (await ledger.alarms())["dead_events"] == 0
    assert await audited(owner) == [
        ("discard", dead_event_id, "acme", {"state": "DISCARDED", "reason": "a test's"}),
    ]


async def test_each_has_one_end_which_sent_again_changes_nothing(dead_events, ledger, owner, spent):
    kept = await put_aside(ledger, an_event("op-1"), event_id="5-0")
    dropped = await put_aside(ledger, an_event("op-2"), event_id="6-0")
    retried = await asyncio.gather(*(dead_events.retry(kept, actor="a") for _ in range(5)))
    assert len(set(map(repr, retried))) == 1
    discarded = await asyncio.gather(*(dead_events.discard(dropped, reason=f"r{n}", actor="a") for n in range(5)))
    assert len(set(map(repr, discarded))) == 1
    assert await spent() == 100
    assert [action for action, *_ in await audited(owner)] == ["retry", "discard"]
    with pytest.raises(DeadEventResolvedError) as resolved:
        await dead_events.discard(kept, reason="x", actor="a")
    assert resolved.value.metadata["state"] == "RETRIED"
    with pytest.raises(DeadEventResolvedError):
        await dead_events.retry(dropped, actor="a")
    assert await spent() == 100


@pytest.mark.parametrize("end", ["retry", "discard"])
async def test_an_end_that_is_cut_short_has_not_happened(dead_events, ledger, owner, spent, monkeypatch, end):
    dead_event_id = await put_aside(ledger, an_event("op-1"))

    async def killed(*_, **__):
        raise DependencyUnavailableError("Postgres")

    monkeypatch.setattr(module, "write_audit", killed)
    arguments = {"reason": "x"} if end == "discard" else {}
    with pytest.raises(DependencyUnavailableError):
        await getattr(dead_events, end)(dead_event_id, actor="a", **arguments)
    assert (await dead_events.get(dead_event_id)).state is DeadEventState.STANDING
    assert await spent() == 0
    monkeypatch.undo()
    await getattr(dead_events, end)(dead_event_id, actor="a", **arguments)
    assert await spent() == (100 if end == "retry" else 0)
    assert len(await audited(owner)) == 1


@pytest.mark.parametrize("end", ["retry", "discard"])
async def test_what_the_stream_brings_again_is_neither_dead_nor_counted_again(dead_events, ledger, owner, spent, end):
    """Its worker had put it aside and was killed before it acknowledged."""
    await owner.execute(REFUSING)
    delivery = a_delivery("dead", shard=ACME, event_id="7-0")
    assert (await ledger.insert_events([delivery])).dead == 1
    assert (await ledger.insert_events([delivery])).dead == 0, "the metric counts events, not how often they came"
    if end == "discard":
        await dead_events.discard(f"{ACME}-7-0", reason="x", actor="a")
    else:
        await owner.execute(MENDED)
        await dead_events.retry(f"{ACME}-7-0", actor="a")
    assert await ledger.insert_events([delivery]) == replace(await ledger.insert_events([]), rows=0, dead=0)
    assert (await ledger.alarms())["dead_events"] == 0
    assert await spent() == (100 if end == "retry" else 0)


EXPIRED = {"end": End.EXPIRED, "delta_nanos": 500}
CONFIRMED = {"sequence": 2, "delta_nanos": -380, "amount_nanos": 120}
CORRECTED = {"end": End.CORRECTED, "sequence": 3, "delta_nanos": -20, "amount_nanos": 100}


@pytest.mark.parametrize(
    ("written", "retried", "sums"),
    [
        ([], [EXPIRED, CONFIRMED, CORRECTED], [500, 120, 100]),
        ([], [CORRECTED, CONFIRMED, EXPIRED], [100, 100, 100]),
        ([EXPIRED], [CONFIRMED], [120]),
        ([CONFIRMED], [EXPIRED], [120]),
        ([EXPIRED, CORRECTED], [CONFIRMED], [100]),
        ([CORRECTED], [CONFIRMED, EXPIRED], [100, 100]),
        # Redis had forgotten the call, and told its whole cost.
        ([EXPIRED], [{"delta_nanos": 120, "forgotten": True}], [120]),
        ([EXPIRED, {**CORRECTED, "sequence": 2, "delta_nanos": -20, "amount_nanos": 100}],
         [{"delta_nanos": 120, "forgotten": True}], [100]),
        # An older Redis expires a hold whose end is in the ledger.
        ([{"delta_nanos": 120}], [EXPIRED], [120]),
        # What is in the ledger already.
        ([{"delta_nanos": 120}], [{"delta_nanos": 120}], [120]),
    ],
)  # fmt: skip
async def test_the_cost_is_what_the_last_word_says_whenever_an_event_comes(
    dead_events, ledger, spent, written, retried, sums
):
    await ledger.insert_events([a_delivery("op-1", shard=ACME, event_id="9-0", **changes) for changes in written])
    await put_aside(ledger, *(an_event("op-1", **changes) for changes in retried))
    for number, expected in enumerate(sums):
        await dead_events.retry(f"{ACME}-{5 + number}-0", actor="a")
        assert await spent() == expected
    again = [
        a_delivery("op-1", shard=ACME, event_id=f"{5 + n}-0", **changes)
        for n, changes in enumerate(retried)
        if not changes.get("forgotten")
    ]
    await ledger.insert_events(again)
    assert await spent() == sums[-1], "the stream brings it again"


CORRECTED_AGAIN = {"end": End.CORRECTED, "sequence": 4, "delta_nanos": 30, "amount_nanos": 130}
STORY = (EXPIRED, CONFIRMED, CORRECTED, CORRECTED_AGAIN)


async def test_a_discard_leaves_what_the_last_word_says(dead_events, ledger, owner, spent):
    """A call expired at 500, of which no row was made; then it was confirmed at 120, a difference of -380."""
    dead_event_id = await put_aside(ledger, an_event("op-1", **EXPIRED))
    await ledger.insert_events([a_delivery("op-1", shard=ACME, event_id="9-0", **CONFIRMED)])
    assert await spent() == -380
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent() == 120
    rows = await owner.fetch("SELECT * FROM usage_ledger ORDER BY rank, sequence")
    told = [(row["end_state"], row["sequence"], row["delta_nanos"], row["amount_nanos"]) for row in rows]
    assert told == [("CONFIRMED", 0, 500, 120), ("CONFIRMED", 2, -380, 120)]
    assert (rows[0]["shard"], rows[0]["event_id"]) == (ACME, "5-0"), "sums up to an event count it where it happened"
    assert rows[0]["detail"] == f"makes up for the dead event {dead_event_id}, which was discarded"
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent() == 120


async def test_whatever_becomes_of_a_calls_events_its_rows_say_what_its_last_word_says(dead_events, ledger, owner):
    """Each event is a row, or dead and then retried or discarded, as soon as it came or after all others came."""
    numbers = iter(range(1, 1_000_000))
    for story in product(["row", "retry", "discard", "retry late", "discard late"], repeat=3):
        late = [number for number, fate in enumerate(story) if fate.endswith("late")]
        for order in permutations(late):
            operation_id, entries = f"op-{next(numbers)}", [f"{next(numbers)}-0" for _ in story]

            async def end(number, story=story, entries=entries):
                dead_event_id = f"{ACME}-{entries[number]}"
                if story[number].startswith("retry"):
                    await dead_events.retry(dead_event_id, actor="a")
                else:
                    await dead_events.discard(dead_event_id, reason="x", actor="a")

            for number, changes in enumerate(STORY[:3]):
                if story[number] == "row":
                    delivery = a_delivery(operation_id, shard=ACME, event_id=entries[number], **changes)
                    assert await ledger.insert_events([delivery]) == Inserted(rows=1, dead=0)
                    continue
                await put_aside(ledger, an_event(operation_id, **changes), event_id=entries[number])
                if number not in late:
                    await end(number)
            for number in order:
                await end(number)
            kept = [amount for amount, fate in zip((500, 120, 100), story, strict=True) if "discard" not in fate]
            cost = await owner.fetchval(
                "SELECT coalesce(sum(delta_nanos), 0) FROM usage_ledger WHERE operation_id = $1", operation_id
            )
            assert cost == (kept[-1] if kept else 0), (story, order)


async def test_differences_that_come_at_once_after_a_discard_are_told_to_the_ledger(dead_events, ledger, spent):
    dead_event_id = await put_aside(ledger, an_event("op-1", **EXPIRED))
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    others = [a_delivery("op-2", shard=ACME, delta_nanos=7), a_delivery("op-2", shard=ACME, **CORRECTED)]
    ours = [a_delivery("op-1", shard=ACME, **changes) for changes in STORY[1:]]
    unspeakable = a_delivery("op-\x00", shard=ACME, **CONFIRMED)
    inserted = await ledger.insert_events([others[0], ours[0], others[1], unspeakable, *ours[1:]])
    assert (inserted.rows, inserted.dead) == (5, 1)
    assert await spent() == 130 + 7 - 20


async def test_what_nobody_can_read_but_for_its_operation_is_made_up_for(dead_events, ledger, spent):
    fields = {"facts": '{"tenant_id":"acme","operation_id":"op-1","unheard-of":1}', "end": "UNHEARD_OF"}
    dead_event_id = await put_aside(ledger, fields)
    await ledger.insert_events([a_delivery("op-1", shard=ACME, **CONFIRMED), a_delivery("op-2", shard=ACME)])
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent() == 120 + 100


@pytest.mark.parametrize(
    "facts",
    [
        '{"tenant_id":"acme"}',
        '{"operation_id":"op-1"}',
        f'{{"tenant_id":"acme","operation_id":"{random.Random(1).randbytes(10_000).hex()}"}}',
        "nonsense",
    ],
    ids=["no operation", "no tenant", "an endless operation", "nothing"],
)
async def test_what_tells_no_operation_of_its_tenant_changes_no_row(dead_events, ledger, spent, facts):
    dead_event_id = await put_aside(ledger, {"facts": facts})
    await ledger.insert_events([a_delivery("op-1", shard=ACME, **CONFIRMED)])
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent() == -380


async def test_of_a_neighbours_operation_no_row_is_changed(dead_events, ledger, spent):
    """An event may tell another tenant's operation as its own."""
    dead_event_id = await put_aside(ledger, {"facts": '{"tenant_id":"acme","operation_id":"op-1"}'})
    await ledger.insert_events([a_delivery("op-1", shard=ACME, tenant_id="neighbour", **CONFIRMED)])
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent("neighbour") == -380


async def test_a_discard_whose_row_the_ledger_refuses_has_not_happened(dead_events, ledger, owner, spent):
    dead_event_id = await put_aside(ledger, an_event("dead", **EXPIRED))
    await ledger.insert_events([a_delivery("dead", shard=ACME, **CONFIRMED)])
    await owner.execute(REFUSING)
    with pytest.raises(DeadEventRefusedError) as refused:
        await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert refused.value.metadata["error"] == "refused by the ledger: CheckViolationError"
    assert (await dead_events.get(dead_event_id)).state is DeadEventState.STANDING
    assert (await spent(), await audited(owner)) == (-380, [])
    await owner.execute(MENDED)
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    assert await spent() == 120


async def waits_for_a_lock(owner, task) -> bool:
    """Wait until a task either waits for somebody's lock in Postgres or is done; says whether it waits."""
    while not task.done():
        if await owner.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
            return True
        await asyncio.sleep(0.01)
    return False


def stop_after(monkeypatch, module, name):
    """Let a function of a module stop before it returns, inside of its transaction; returns (it stopped, go on)."""
    stopped, go_on, function = asyncio.Event(), asyncio.Event(), getattr(module, name)

    async def stopping(*arguments, **named):
        answer = await function(*arguments, **named)
        stopped.set()
        await go_on.wait()
        return answer

    monkeypatch.setattr(module, name, stopping)
    return stopped, go_on


async def test_a_discard_sees_the_row_that_is_being_written(dead_events, ledger, owner, spent, monkeypatch):
    dead_event_id = await put_aside(ledger, an_event("op-1", **EXPIRED))
    stopped, go_on = stop_after(monkeypatch, ledger_module, "_insert")
    drain = asyncio.create_task(ledger.insert_events([a_delivery("op-1", shard=ACME, **CONFIRMED)]))
    await stopped.wait()
    discard = asyncio.create_task(dead_events.discard(dead_event_id, reason="x", actor="a"))
    assert await waits_for_a_lock(owner, discard)
    go_on.set()
    await asyncio.gather(drain, discard)
    assert await spent() == 120


async def test_a_row_is_written_by_what_a_discard_under_way_leaves(dead_events, ledger, owner, spent, monkeypatch):
    dead_event_id = await put_aside(ledger, an_event("op-1", **EXPIRED))
    stopped, go_on = stop_after(monkeypatch, module, "write_audit")
    discard = asyncio.create_task(dead_events.discard(dead_event_id, reason="x", actor="a"))
    await stopped.wait()
    drain = asyncio.create_task(ledger.insert_events([a_delivery("op-1", shard=ACME, **CONFIRMED)]))
    assert await waits_for_a_lock(owner, drain)
    go_on.set()
    await asyncio.gather(drain, discard)
    assert await spent() == 120


@pytest.mark.parametrize("reason", ["", "  ", "x" * 501, "a\nb"])
async def test_a_discard_says_why(dead_events, ledger, reason):
    dead_event_id = await put_aside(ledger, an_event())
    with pytest.raises(InvalidError) as invalid:
        await dead_events.discard(dead_event_id, reason=reason, actor="a")
    assert invalid.value.violations[0].field == "reason"
    assert (await dead_events.get(dead_event_id)).state is DeadEventState.STANDING


@pytest.mark.parametrize("dead_event_id", ["", "nonsense", f"{ACME}-4-0", f"{ACME}-5", "999-5-0", "1-5-0"])
async def test_what_is_not_there_has_no_end(dead_events, ledger, dead_event_id):
    await put_aside(ledger, an_event())
    for attempt in (
        dead_events.get(dead_event_id),
        dead_events.retry(dead_event_id, actor="a"),
        dead_events.discard(dead_event_id, reason="x", actor="a"),
    ):
        with pytest.raises(NotFoundError):
            await attempt


async def test_a_listing_pages_newest_first_and_filters(dead_events, ledger):
    await put_aside(ledger, *(an_event(f"op-{number}") for number in range(3)), event_id="5-0")
    await put_aside(ledger, {"nonsense": "x"}, an_event(tenant_id="other"), event_id="8-0", shard=OTHER)
    await dead_events.discard(f"{ACME}-6-0", reason="x", actor="a")
    everything = [event.dead_event_id for event in (await dead_events.list(DeadEventFilter())).items]
    assert set(everything[:2]) == {f"{OTHER}-8-0", f"{OTHER}-9-0"}
    assert everything[2:] == [f"{ACME}-7-0", f"{ACME}-6-0", f"{ACME}-5-0"]
    seen, token = [], ""
    while page := await dead_events.list(DeadEventFilter(), page_size=2, page_token=token):
        seen += [event.dead_event_id for event in page.items]
        if not (token := page.next_page_token):
            break
    assert seen == everything

    async def found(**wanted):
        return sorted(event.event_id for event in (await dead_events.list(DeadEventFilter(**wanted))).items)

    assert await found(tenant_id="acme") == ["5-0", "6-0", "7-0"]
    assert await found(tenant_id="other") == ["9-0"]
    assert await found(shard=OTHER) == ["8-0", "9-0"]
    assert await found(state=DeadEventState.DISCARDED) == ["6-0"]
    assert await found(state=DeadEventState.STANDING, tenant_id="acme") == ["5-0", "7-0"]
    token = (await dead_events.list(DeadEventFilter(), page_size=1)).next_page_token
    with pytest.raises(InvalidError):
        await dead_events.list(STANDING, page_token=token)


async def test_nobody_changes_or_takes_away_what_was_put_aside(dead_events, ledger, owner, app):
    dead_event_id = await put_aside(ledger, an_event())
    for change in ("DELETE FROM dead_events", "TRUNCATE dead_events", "UPDATE dead_events SET fields = ''"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute(change)
        with pytest.raises(asyncpg.RestrictViolationError):
            await owner.execute(change)
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    with pytest.raises(asyncpg.RestrictViolationError):
        await app.execute("UPDATE dead_events SET state = 'STANDING', reason = '', resolved_at = NULL")


async def test_those_of_before_are_asked_whose_they_are(migrated_database, dead_events, ledger, owner, database):
    await put_aside(ledger, an_event(), {"nonsense": "x"}, an_event(tenant_id="other"))
    await put_aside(ledger, an_event(tenant_id="nobody"), shard=shard_of("nobody"))
    await downgrade(migrated_database.owner_url, "0006")
    # Some that its reading must survive.
    for number, fields in enumerate([b"[]", b'{"facts":5}', b'{"facts":"{\\"tenant_id\\":\\"\\\\u0000\\"}"}', b"\xff"]):
        await owner.execute("INSERT INTO dead_events VALUES ($1, $2, $3, 'x')", number, "5-0", fields)
    await migrate(migrated_database.owner_url)
    assert {row["event_id"] for row in await owner.fetch("SELECT * FROM dead_events WHERE tenant_id = 'acme'")} == {
        "5-0"
    }
    assert await owner.fetchval("SELECT count(*) FROM dead_events WHERE tenant_id = ''") == 7


async def test_a_downgrade_lets_no_ended_event_stand_again(migrated_database, dead_events, ledger, owner):
    dead_event_id = await put_aside(ledger, an_event())
    await dead_events.discard(dead_event_id, reason="x", actor="a")
    with pytest.raises(Exception, match="downgrade refused: dead events were ended"):
        await downgrade(migrated_database.owner_url, "0006")
    assert await owner.fetchval("SELECT state FROM dead_events") == "DISCARDED"
