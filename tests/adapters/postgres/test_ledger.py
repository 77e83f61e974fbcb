import asyncio
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest

from budgetguard.adapters.postgres.ledger import DeadEvent, LedgerRepository
from budgetguard.adapters.postgres.ledger_activity import LedgerActivity
from budgetguard.adapters.postgres.ledger_reader import LedgerReader
from budgetguard.adapters.postgres.ledger_sums import LedgerSums, _spent_query
from budgetguard.adapters.postgres.pool import open_database
from budgetguard.core.budget import counted_subjects
from budgetguard.core.entities import LedgerFilter, UsageGroup
from budgetguard.core.errors import DependencyUnavailableError, InvalidError
from budgetguard.core.events import entry_order
from budgetguard.core.money import COUNTER_NANOS_MAX
from budgetguard.core.operation import RANK, End
from budgetguard.core.snapshot import SubjectKind, WindowKind
from budgetguard.core.usage import Usage
from budgetguard.core.window import Window
from tests.plugins.redis_calls import a_budget
from tests.plugins.usage_events import NOW_MS, a_delivery, milliseconds

EVERYTHING = {"tenant_id": "acme", "subject_kind": SubjectKind.TENANT, "subject": "", "from_ms": 0, "until_ms": None}


@pytest.fixture
def reader(database):
    return LedgerReader(database)


async def test_a_row_comes_back_as_it_went_in(ledger, reader):
    usage = Usage(input_tokens=10, output_tokens=0, cache_read_tokens=2**60)
    shard, event_id, event = a_delivery(
        "op-1",
        usage=usage,
        detail="größer 'x' \\ \"y\"",
        delta_nanos=-5,
        amount_nanos=2**53 - 1,
        sequence=3,
        stream=True,
        priced_model="gpt-4o",
    )
    inserted = await ledger.insert_events([(shard, event_id, event)])
    assert (inserted.rows, inserted.dead) == (1, 0)
    (row,) = (await reader.list(LedgerFilter())).items
    for name in ("sequence", "delta_nanos", "amount_nanos", "hold_nanos", "usage", "status", "detail", "end", "rank"):
        assert getattr(row, name) == getattr(event, name)
    for name in ("operation_id", "tenant_id", "key_id", "held_at_ms", "api", "provider_id", "model", "price_version"):
        assert getattr(row, name) == getattr(event.facts, name)
    assert row.priced_model == "gpt-4o"
    assert (row.shard, row.event_id, row.stream, row.rate_tier) == (shard, event_id, True, "default")
    assert row.ended_at_ms == event.ended_at_ms
    assert row.recorded_at_ms > 0


SPELLINGS = [
    ("gpt-4o-mini", "gpt-4o-mini"),
    ("GPT-4o-mini", "gpt-4o-mini"),
    ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
    ("Gpt-4o-Mini-2024-07-18", "gpt-4o-mini"),
    ("gpt-4o-mini-2024-07-18", "gpt-4o-mini-2024-07-18"),
    ("gpt-4o", "gpt-4o"),
    # From before it was recorded.
    ("gpt-4o-mini-2024-07-18", ""),
    ("gpt-4o-mini", ""),
    # Letters whose lower case Python and Postgres might see otherwise.
    ("\u212a\u00c9\u0130", "\u00c9"),
    ("k\u00e9i", ""),
]


@pytest.mark.parametrize(
    "budget",
    [
        *(a_budget(subject_kind=SubjectKind.MODEL, subject=name) for pair in SPELLINGS for name in pair if name),
        a_budget(subject_kind=SubjectKind.MODEL, subject="GPT-4O"),
        a_budget(subject_kind=SubjectKind.MODEL, each=True),
    ],
    ids=lambda budget: budget.subject or "each",
)
async def test_a_model_s_spend_is_what_its_budget_counts(database, ledger, budget):
    """The ledger's sums, which counters are rebuilt from, against the rule by which calls are counted."""
    deliveries = [
        a_delivery(f"op-{number}", model=model, priced_model=priced, delta_nanos=2**number)
        for number, (model, priced) in enumerate(SPELLINGS)
    ]
    expected = Counter()
    for _, _, event in deliveries:
        expected.update(dict.fromkeys(counted_subjects(budget, event.facts), event.delta_nanos))
    await ledger.insert_events(deliveries)
    sums = await LedgerSums(database).spent("acme", budget, Window(0, None))
    assert sums == {(subject, None): nanos for subject, nanos in expected.items()}
    window = {"tenant_id": "acme", "from_ms": 0, "until_ms": None}
    if not budget.each:
        whose = {"subject_kind": SubjectKind.MODEL, "subject": budget.subject}
        assert await ledger.spent(**window, **whose) == expected[""]
        return
    activity = LedgerActivity(database)
    assert await activity.spent_by_subject(**window, kind=SubjectKind.MODEL, active_since_ms=0) == expected


async def test_the_same_events_again_change_nothing(ledger, reader):
    deliveries = [a_delivery(f"op-{number}") for number in range(5)]
    assert (await ledger.insert_events(deliveries)).rows == 5
    assert (await ledger.insert_events(deliveries)).rows == 0
    again_by_other_entries = [(shard, "99-9", event) for shard, _, event in deliveries]
    assert (await ledger.insert_events([*again_by_other_entries, a_delivery("op-new")])).rows == 1
    assert await ledger.spent(**EVERYTHING) == 600
    assert len((await reader.list(LedgerFilter())).items) == 6


async def test_each_rank_of_an_operation_is_a_row_and_their_sum_is_its_cost(ledger, reader):
    await ledger.insert_events(
        [
            a_delivery("op-1", end=End.EXPIRED, delta_nanos=500, amount_nanos=500, sequence=1),
            a_delivery("op-1", end=End.CONFIRMED, delta_nanos=-380, amount_nanos=120, sequence=2),
        ]
    )
    assert await ledger.spent(**EVERYTHING) == 120
    ends = [row.end for row in (await reader.list(LedgerFilter(operation_id="op-1"))).items]
    assert ends == [End.CONFIRMED, End.EXPIRED]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("together", [True, False])
async def test_ends_sum_to_the_last_word_in_whatever_order_workers_write_them(ledger, order, together):
    """Two workers take them from the stream, one is killed, and what it had taken is written later by a third."""
    ends = [
        a_delivery("op-1", end=End.EXPIRED, delta_nanos=500, amount_nanos=500, sequence=1, event_id="5-1"),
        a_delivery("op-1", end=End.CONFIRMED, delta_nanos=-380, amount_nanos=120, sequence=2, event_id="5-2"),
        a_delivery("op-1", end=End.CORRECTED, delta_nanos=-20, amount_nanos=100, sequence=3, event_id="5-3"),
    ]
    in_order = [ends[index] for index in order]
    for batch in [in_order] if together else [[end] for end in in_order]:
        await ledger.insert_events(batch)
    assert await ledger.spent(**EVERYTHING) == 100
    await ledger.insert_events(ends)
    assert await ledger.spent(**EVERYTHING) == 100


async def test_the_month_of_admission_decides_not_that_of_the_end(ledger, owner):
    held_at_ms = milliseconds("2001-01-31T23:59:59.999")
    await owner.execute("SELECT make_ledger_partition(date '2001-01-01'), make_ledger_partition(date '2001-02-01')")
    await ledger.insert_events(
        [
            a_delivery("op-1", held_at_ms=held_at_ms, end=End.ESTIMATED, ended_at_ms=held_at_ms + 5),
            a_delivery(
                "op-1",
                held_at_ms=held_at_ms,
                ended_at_ms=held_at_ms + 86_400_000,
                end=End.CONFIRMED,
                delta_nanos=7,
                amount_nanos=107,
                sequence=2,
            ),
        ]
    )
    assert await owner.fetchval("SELECT count(*) FROM usage_ledger_2001_01") == 2
    january, february = milliseconds("2001-01-01T00:00:00"), milliseconds("2001-02-01T00:00:00")
    assert await ledger.spent(**{**EVERYTHING, "from_ms": january, "until_ms": february}) == 107
    assert await ledger.spent(**{**EVERYTHING, "from_ms": february}) == 0


async def test_spent_is_exact_beyond_64_bits_and_by_subject_and_window(ledger):
    await ledger.insert_events([a_delivery(f"op-{n}", delta_nanos=COUNTER_NANOS_MAX) for n in range(3)])
    assert await ledger.spent(**EVERYTHING) == 3 * COUNTER_NANOS_MAX
    await ledger.insert_events([a_delivery("b", key_id="b" * 16, delta_nanos=11, held_at_ms=1_000_000)])
    await ledger.insert_events([a_delivery("c", tenant_id="other", delta_nanos=13)])
    by_key = {**EVERYTHING, "subject_kind": SubjectKind.API_KEY, "subject": "b" * 16}
    assert await ledger.spent(**by_key) == 11
    assert await ledger.spent(**{**by_key, "from_ms": 1_000_000, "until_ms": 1_000_001}) == 11
    assert await ledger.spent(**{**by_key, "until_ms": 1_000_000}) == 0
    assert await ledger.spent(**{**by_key, "from_ms": 1_000_001}) == 0


async def test_an_operation_that_redis_forgot_is_charged_the_difference(ledger):
    await ledger.insert_events([a_delivery("op-1", end=End.EXPIRED, delta_nanos=500)])
    late = a_delivery("op-1", end=End.CONFIRMED, delta_nanos=120, forgotten=True)
    assert (await ledger.insert_events([late])).rows == 1
    assert await ledger.spent(**EVERYTHING) == 120
    same_rank = a_delivery("op-1", end=End.CONFIRMED, delta_nanos=90, sequence=2, forgotten=True)
    lower = a_delivery("op-1", end=End.ESTIMATED, delta_nanos=80, sequence=9, forgotten=True)
    assert (await ledger.insert_events([late, same_rank, lower])).rows == 0
    assert await ledger.spent(**EVERYTHING) == 120


async def test_a_forgotten_operation_sees_the_rows_before_it_in_its_own_batch(ledger):
    batch = [
        a_delivery("op-1", end=End.EXPIRED, delta_nanos=500),
        a_delivery("op-1", end=End.CONFIRMED, delta_nanos=120, forgotten=True),
        a_delivery("op-1", end=End.CORRECTED, delta_nanos=-20, amount_nanos=100, sequence=2),
    ]
    assert (await ledger.insert_events(batch)).rows == 3
    assert await ledger.spent(**EVERYTHING) == 100


async def test_an_end_that_stands_is_not_charged_again_when_a_revived_hold_expires(ledger):
    """A Redis that came back older may have the hold again, and nobody else remembers that it has ended."""
    await ledger.insert_events([a_delivery("op-1", end=End.CONFIRMED, delta_nanos=120)])
    expired = a_delivery("op-1", end=End.EXPIRED, delta_nanos=500, event_id="9-1")
    assert (await ledger.insert_events([expired])).rows == 0
    assert await ledger.spent(**EVERYTHING) == 120


async def test_two_writers_of_one_forgotten_operation_charge_it_once(ledger):
    first = a_delivery("op-1", end=End.EXPIRED, delta_nanos=500)
    late = a_delivery("op-1", end=End.CONFIRMED, delta_nanos=120, forgotten=True)
    await ledger.insert_events([first])
    await asyncio.gather(*(ledger.insert_events([late]) for _ in range(6)))
    assert await ledger.spent(**EVERYTHING) == 120


async def test_the_position_moves_with_the_rows_and_never_back(ledger):
    await ledger.insert_events([a_delivery("a", event_id="5-10"), a_delivery("b", event_id="5-9", shard=8)])
    await ledger.insert_events([a_delivery("c", event_id="5-2")])
    await ledger.insert_events([], dead=[DeadEvent(shard=8, event_id="6-0", fields={}, error="x")])
    assert await ledger.positions() == {7: (5, 10), 8: (6, 0)}
    assert entry_order("5-10") > entry_order("5-9")
    with pytest.raises(ValueError):
        entry_order("5")


@pytest.mark.parametrize(
    "poison",
    [
        {"model": "nul\x00"},
        {"delta_nanos": 2**63, "amount_nanos": 1},
        {"held_at_ms": 10**18, "ended_at_ms": 1},
        {"ended_at_ms": -(10**18)},
        {"amount_nanos": -1},
        {"status": 2**40},
        {"session_id": "".join(map(chr, range(200, 9000)))},
        {"model": 5},
    ],
    ids=lambda poison: next(iter(poison)),
)
@pytest.mark.parametrize("forgotten", [False, True])
async def test_a_poisonous_event_blocks_nobody(ledger, owner, poison, forgotten):
    batch = [
        a_delivery("before"),
        a_delivery("poison", event_id="77-7", forgotten=forgotten, **poison),
        a_delivery("after"),
    ]
    inserted = await ledger.insert_events(batch)
    assert (inserted.rows, inserted.dead) == (2, 1)
    assert await ledger.spent(**EVERYTHING) == 200
    dead = await owner.fetchrow("SELECT * FROM dead_events")
    assert (dead["shard"], dead["event_id"]) == (7, "77-7")
    assert b"poison" in dead["fields"]
    assert (await ledger.alarms())["dead_events"] == 1
    assert (await ledger.insert_events(batch)).rows == 0
    assert (await ledger.alarms())["dead_events"] == 1


async def test_a_single_poisonous_event_is_put_aside_too(ledger):
    inserted = await ledger.insert_events([a_delivery("poison", model="\x00")])
    assert (inserted.rows, inserted.dead) == (0, 1)


async def test_two_writers_of_many_shards_do_not_block_each_other(migrated_database):
    pools = [await open_database(migrated_database.app_url) for _ in range(2)]
    try:
        deliveries = [a_delivery(f"op-{shard}", shard=shard) for shard in range(40)]
        batches = [deliveries, deliveries[::-1]] * 5
        inserted = await asyncio.gather(
            *(LedgerRepository(pools[n % 2]).insert_events(batch) for n, batch in enumerate(batches))
        )
        assert sum(done.rows for done in inserted) == 40
    finally:
        for pool in pools:
            await pool.close()


async def test_listing_pages_newest_first_without_gaps_while_rows_come(ledger, reader):
    for number in range(7):
        await ledger.insert_events([a_delivery(f"op-{number}", held_at_ms=NOW_MS + number // 2)])
    wanted = LedgerFilter(tenant_id="acme")
    page = await reader.list(wanted, page_size=3)
    seen = [row.operation_id for row in page.items]
    await ledger.insert_events([a_delivery("newest", held_at_ms=NOW_MS + 100)])
    while page.next_page_token:
        page = await reader.list(wanted, page_size=3, page_token=page.next_page_token)
        seen += [row.operation_id for row in page.items]
    assert seen == [f"op-{number}" for number in reversed(range(7))]


async def test_a_page_token_belongs_to_its_filters(ledger, reader):
    await ledger.insert_events([a_delivery(f"op-{number}") for number in range(3)])
    token = (await reader.list(LedgerFilter(tenant_id="acme"), page_size=1)).next_page_token
    for other in (LedgerFilter(), LedgerFilter(tenant_id="other")):
        with pytest.raises(InvalidError):
            await reader.list(other, page_token=token)
    with pytest.raises(InvalidError):
        await reader.list(LedgerFilter(from_ms=10**18))


async def test_filters_restrict(ledger, reader):
    await ledger.insert_events(
        [
            a_delivery("a", model="x", held_at_ms=NOW_MS),
            a_delivery("b", key_id="b" * 16, held_at_ms=NOW_MS + 10),
            a_delivery("c", tenant_id="other", end=End.RELEASED, delta_nanos=0, held_at_ms=NOW_MS + 20),
        ]
    )

    async def found(**fields):
        return {row.operation_id for row in (await reader.list(LedgerFilter(**fields))).items}

    assert await found() == {"a", "b", "c"}
    assert await found(tenant_id="acme") == {"a", "b"}
    assert await found(tenant_id="acme", key_id="b" * 16) == {"b"}
    assert await found(model="x") == {"a"}
    assert await found(end=End.RELEASED) == {"c"}
    assert await found(operation_id="b") == {"b"}
    assert await found(from_ms=NOW_MS + 10) == {"b", "c"}
    assert await found(until_ms=NOW_MS + 10) == {"a"}
    assert await found(from_ms=NOW_MS + 10, until_ms=NOW_MS + 11) == {"b"}


async def test_sums_count_an_operation_once_with_the_usage_of_its_last_word(ledger, reader):
    day = milliseconds("2001-01-31T23:59:59")
    await ledger.insert_events(
        [
            a_delivery(
                "a", held_at_ms=day, end=End.ESTIMATED, delta_nanos=500, usage=Usage(input_tokens=9, output_tokens=9)
            ),
            a_delivery(
                "a",
                held_at_ms=day,
                delta_nanos=-300,
                amount_nanos=200,
                sequence=2,
                usage=Usage(input_tokens=3, output_tokens=4),
            ),
            a_delivery("b", held_at_ms=day + 1000, model="other", key_id="b" * 16, delta_nanos=1, usage=None),
            a_delivery("c", tenant_id="other", delta_nanos=1_000),
        ]
    )
    acme = LedgerFilter(tenant_id="acme")
    by_day = await reader.sums(acme, by=UsageGroup.DAY)
    assert [(one.group, one.operations, one.cost_nanos) for one in by_day] == [
        ("2001-01-31", 1, 200),
        ("2001-02-01", 1, 1),
    ]
    assert by_day[0].usage == Usage(input_tokens=3, output_tokens=4)
    assert by_day[1].usage == Usage()
    by_model = await reader.sums(acme, by=UsageGroup.MODEL)
    assert [(one.group, one.cost_nanos) for one in by_model] == [("gpt-4o-mini", 200), ("other", 1)]
    by_key = await reader.sums(acme, by=UsageGroup.API_KEY)
    assert [(one.group[0], one.cost_nanos) for one in by_key] == [("b", 1), ("k", 200)]
    assert await reader.sums(replace(acme, until_ms=0), by=UsageGroup.DAY) == ()


async def test_last_words_tell_how_operations_stand(ledger):
    await ledger.insert_events(
        [
            a_delivery("a", end=End.EXPIRED, delta_nanos=500),
            a_delivery("a", end=End.CONFIRMED, delta_nanos=-400, amount_nanos=100, sequence=2),
            a_delivery("old", held_at_ms=NOW_MS - 10_000_000),
        ]
    )
    (word,) = await ledger.last_words("acme", held_from_ms=NOW_MS, recorded_from_ms=0)
    assert (word.facts.operation_id, word.end, word.amount_nanos, word.sequence) == ("a", End.CONFIRMED, 100, 2)
    assert RANK[word.end] == 3
    assert await ledger.last_words("acme", held_from_ms=NOW_MS + 1, recorded_from_ms=0) == ()
    assert await ledger.last_words("other", held_from_ms=0, recorded_from_ms=0) == ()


HOUR_MS = 3_600_000


async def words(ledger, **changes) -> dict[str, End]:
    since = {"held_from_ms": NOW_MS - 100 * HOUR_MS, "recorded_from_ms": NOW_MS - HOUR_MS, **changes}
    return {word.facts.operation_id: word.end for word in await ledger.last_words("acme", **since)}


async def test_last_words_are_of_what_was_recorded_lately_however_long_ago_it_ended(ledger, owner):
    long_ago = {"held_at_ms": NOW_MS - 50 * HOUR_MS, "ended_at_ms": NOW_MS - 49 * HOUR_MS}
    await owner.execute("ALTER TABLE usage_ledger ALTER recorded_at SET DEFAULT now() - interval '2 hours'")
    await ledger.insert_events(
        [
            a_delivery("settled", **long_ago),
            a_delivery("overtaken", **long_ago),
            a_delivery("expired", end=End.EXPIRED, **long_ago),
        ]
    )
    await owner.execute("ALTER TABLE usage_ledger ALTER recorded_at SET DEFAULT now()")
    await ledger.insert_events(
        [
            a_delivery("overtaken", end=End.ESTIMATED, delta_nanos=0, **long_ago, sequence=2),
            a_delivery("expired", **long_ago, sequence=2),
            a_delivery("late", **long_ago),
        ]
    )
    # By all of its rows, also where the last one that came in is not the last word.
    lately = {"overtaken": End.CONFIRMED, "expired": End.CONFIRMED, "late": End.CONFIRMED}
    assert await words(ledger) == lately
    named = ["settled", "late", "nobody's"]
    assert await words(ledger, operation_ids=named) == {**lately, "settled": End.CONFIRMED}
    assert await words(ledger, operation_ids=named, held_from_ms=NOW_MS) == dict.fromkeys(
        ("late", "settled"), End.CONFIRMED
    )


async def test_last_words_of_named_operations_are_the_tenant_s_own(ledger):
    await ledger.insert_events([a_delivery("mine"), a_delivery("theirs", tenant_id="other")])
    assert list(await words(ledger, recorded_from_ms=NOW_MS + HOUR_MS, operation_ids=["mine", "theirs"])) == ["mine"]


async def test_a_sum_has_the_time_that_it_is_given_and_no_later_statement_has_it(database, ledger, owner):
    """Rows are seen here by statements that may take so long, and by no others."""
    await ledger.insert_events([a_delivery("op-1")])
    await owner.execute(
        "CREATE POLICY seen ON usage_ledger FOR SELECT USING (current_setting('statement_timeout') = '90s')"
    )
    await owner.execute("ALTER TABLE usage_ledger ENABLE ROW LEVEL SECURITY")
    sums = LedgerSums(database)
    assert await sums.spent("acme", a_budget(), Window(0, None), within_s=90.0) == {("", None): 100}
    assert await words(ledger, within_s=90.0) == {"op-1": End.CONFIRMED}
    # The pool gives the same connection again.
    assert await sums.spent("acme", a_budget(), Window(0, None)) == {}
    assert await words(ledger) == {}


async def test_a_sum_that_takes_too_long_is_given_up(database, ledger, owner):
    await ledger.insert_events([a_delivery("op-1")])
    await owner.execute("CREATE POLICY slow ON usage_ledger FOR SELECT USING (pg_sleep(300) IS NOT NULL)")
    await owner.execute("ALTER TABLE usage_ledger ENABLE ROW LEVEL SECURITY")
    with pytest.raises(DependencyUnavailableError):
        await LedgerSums(database).spent("acme", a_budget(), Window(0, None), within_s=0.1)


@pytest.mark.parametrize(
    ("kind", "subject", "column"),
    [
        (SubjectKind.API_KEY, f"{7:016}", "key_id"),
        (SubjectKind.SESSION, "s7", "session_id"),
        (SubjectKind.END_USER, "u7", "end_user"),
    ],
)
async def test_a_subject_s_rows_are_found_by_its_index_also_in_a_plan_for_all_subjects(
    ledger, app, owner, kind, subject, column
):
    """Postgres makes such a plan, without looking at the values, once a query was asked several times."""
    deliveries = [
        a_delivery(f"op-{n}", key_id=f"{n % 400:016}", session_id=f"s{n % 400}", end_user=f"u{n % 400}")
        for n in range(4_000)
    ]
    await ledger.insert_events(deliveries)
    await owner.execute("ANALYZE usage_ledger")
    await app.execute("SET plan_cache_mode = force_generic_plan")
    budget = a_budget(subject_kind=kind, subject=subject, window=WindowKind.MONTH)
    windows = [Window(0, None), Window(NOW_MS - HOUR_MS, NOW_MS + HOUR_MS)]
    for number, window in enumerate(windows):
        query, arguments = _spent_query("acme", budget, window, f"{NOW_MS}-0")
        await app.execute(f"PREPARE sum_{number} AS {query}")
        values = ", ".join("NULL" if value is None else f"'{value}'" for value in arguments)
        plan = "\n".join(row[0] for row in await app.fetch(f"EXPLAIN EXECUTE sum_{number} ({values})"))
        assert f"Index Cond: ((tenant_id = $1) AND ({column} = $" in plan, plan
