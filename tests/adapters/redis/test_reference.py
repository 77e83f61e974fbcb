"""Every script against its reference: the same random events, the same answers, the same whole state."""

import asyncio
import time
from dataclasses import replace
from urllib.parse import unquote

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from budgetguard.adapters.redis import keys
from budgetguard.adapters.redis.client import RedisClient
from budgetguard.adapters.redis.counters import Counters
from budgetguard.adapters.redis.epoch import Epoch
from budgetguard.adapters.redis.reconciling import CounterBook
from budgetguard.adapters.redis.spelling import counter_of, operation_of, reserve_answer
from budgetguard.core import reserving
from budgetguard.core import shard as reference
from budgetguard.core.budget import NotReady, RememberedEnd, Reserve, Reserved
from budgetguard.core.counter import Unit, calls_counter_name, counter_name, read_name, template_of, tokens_counter_name
from budgetguard.core.counting import Counter, as_of
from budgetguard.core.events import UsageEvent, facts_from_json, split_counters
from budgetguard.core.extension import CounterLimit, Extension
from budgetguard.core.money import CALL_NANOS_MAX, COUNTER_NANOS_MAX
from budgetguard.core.operation import LEASE_MS, End
from budgetguard.core.rate_limit import Minute
from budgetguard.core.shard import Operation, Shard, SignOff
from budgetguard.core.snapshot import Mode, SubjectKind, WindowKind
from budgetguard.core.usage import Usage
from budgetguard.core.window import bounds
from tests.plugins.redis_calls import a_budget, a_handoff, a_key, a_settlement, a_tenant, newest_event, the_facts

# Two tenants of one shard, so that a mix-up would show; one has characters that keys must escape. NOBODY has no record.
SHARD = keys.shard_of("acme")
TENANTS = ["acme", next(name for i in range(9999) if keys.shard_of(name := f"t:{{{i}}}") == SHARD)]
NOBODY = next(name for i in range(9999) if keys.shard_of(name := f"nobody-{i}") == SHARD)
KEY_IDS = ["a" * 16, "b" * 16]
OPERATIONS = [f"op:{number}" for number in range(12)]
HOUR_MS = 3_600_000
LATE = None
BACKLOG_MAX = 5

SMALL = st.integers(0, 2000)
AROUND_2_53 = st.integers(2**53 - 2000, CALL_NANOS_MAX)
# Output tokens that cost about nothing, a nano, and as much as one call can carry.
FEMTOS = st.one_of(st.integers(0, 5 * 10**6), st.integers(0, 5 * 10**6), st.integers(10**17, 10**19), st.just(10**22))
AMOUNTS = st.one_of(SMALL, SMALL, AROUND_2_53)
LIMITS = st.one_of(
    SMALL,
    SMALL,
    st.integers(0, 20_000),
    st.integers(2**53 - 2000, 2**53 + 2000),
    st.integers(COUNTER_NANOS_MAX - 2000, COUNTER_NANOS_MAX),
)
COUNTED = st.one_of(LIMITS, st.integers(-2000, 0), st.integers(-(2**53), -(2**53) + 2000))


SUBJECTS = [
    (SubjectKind.TENANT, ""),
    *((SubjectKind.API_KEY, key_id) for key_id in ["", *KEY_IDS]),
    *((SubjectKind.TAG, tag) for tag in ["", "a", "b"]),
    *((SubjectKind.SESSION, session) for session in ["", "s:1"]),
    (SubjectKind.END_USER, ""),
    *((SubjectKind.MODEL, model) for model in ["", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"]),
    (SubjectKind.PROVIDER, ""),
]
WHOSE = st.fixed_dictionaries(
    {
        "tags": st.sampled_from([(), ("a",), ("a", "b")]),
        "session_id": st.sampled_from(["", "s:1", "s:2", "s 3"]),
        "end_user": st.sampled_from(["", "\u00e9", "u2"]),
        "model": st.sampled_from(["gpt-4o-mini", "GPT-4o-mini", "gpt-4o-mini-2024-07-18"]),
        "priced_model": st.sampled_from(["gpt-4o-mini", "gpt-4o-mini", ""]),
    }
)
# Most tenants and keys have no limit of a kind, else one that is soon reached.
FEW = st.sampled_from([0, 0, 0, 1, 3])
TOKEN_LIMITS = st.sampled_from([0, 0, 0, 50, 3000, 10**6])


@st.composite
def budgets(draw, number):
    kind, subject = draw(st.sampled_from(SUBJECTS))
    return a_budget(
        f"b{number}",
        draw(LIMITS),
        subject_kind=kind,
        subject=subject,
        each=kind is not SubjectKind.TENANT and not subject,
        subjects_max=draw(st.sampled_from([1, 2, 10])),
        seeding=draw(st.sampled_from([False, False, False, True])),
        window=draw(st.sampled_from(WindowKind)),
        rolling_ms=draw(st.sampled_from([60_000, 90_000, 3_600_000, 30 * 24 * HOUR_MS])),
        zone=draw(st.sampled_from(["UTC", "America/New_York"])),
        mode=draw(st.sampled_from([Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE])),
        starts_at_ms=0,
        ends_at_ms=draw(st.sampled_from([None, 1000, 10**14])),
    )


@st.composite
def tenants(draw, tenant_id):
    specs = [draw(budgets(number)) for number in range(draw(st.integers(0, 3)))]
    limits = {"requests_per_minute": draw(FEW), "concurrent_calls": draw(FEW), "tokens_per_minute": draw(TOKEN_LIMITS)}
    return a_tenant(*specs, tenant_id=tenant_id, unbounded_share=draw(st.sampled_from([8, 8, 0, 2])), **limits)


class Scripts(RuleBasedStateMachine):
    """Drives Redis and the reference together. Redis' clock is real; ours starts an hour ahead and moves at will."""

    url = ""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = RedisClient(self.url, timeout_seconds=10)
        self.counters = Counters(self.redis, backlog_max=BACKLOG_MAX)
        self.epoch = Epoch(self.redis)
        self.book = CounterBook(self.redis)
        self.run(self.redis.command("FLUSHALL"))
        self.run_id = self.run(self.epoch.run_id())
        self.shard = Shard()
        self.now_ms = int(time.time()) * 1000 + HOUR_MS
        self.tenants = {name: a_tenant(tenant_id=name) for name in TENANTS}
        self.api_keys = {(name, key_id): a_key(name, key_id) for name in TENANTS for key_id in KEY_IDS}
        self.asked: dict[tuple[str, str], Reserve] = {}
        self.told: dict[tuple[str, str], Reserved] = {}

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def teardown(self):
        self.run(self.redis.close())
        self.runner.close()

    @initialize(tenants=st.tuples(*(tenants(name) for name in TENANTS)))
    def start_in_use(self, tenants):
        self.begin_opening(self.run_id)
        self.sign_off(ahead=0, rebuilt=False)
        for tenant in tenants:
            self.tenants[tenant.tenant_id] = tenant
            self.publish(tenant)
        for key in self.api_keys.values():
            self.publish(key)

    def publish(self, snapshot):
        if hasattr(snapshot, "key_id"):
            stored = self.run(self.counters.publish_key(snapshot))
            names = (snapshot.tenant_id, snapshot.key_id)
        else:
            stored = self.run(self.counters.publish_tenant(snapshot))
            names = (snapshot.tenant_id,)
        assert stored == reference.publish(self.shard, names, snapshot.version)

    @rule(tenant=st.sampled_from(TENANTS).flatmap(tenants), told=st.sampled_from([True, True, True, False]))
    def change_tenant(self, tenant, told):
        tenant = replace(tenant, version=self.tenants[tenant.tenant_id].version + 1)
        self.publish(tenant)
        if told:  # else whoever asks is stale
            self.tenants[tenant.tenant_id] = tenant

    @rule(
        data=st.data(),
        tenant_id=st.sampled_from(TENANTS),
        room_nanos=st.sampled_from([-5000, -1, 0, 1, 100, 5000]),
        counts_afresh=st.sampled_from([False, False, True]),
    )
    def edit_a_budget(self, data, tenant_id, room_nanos, counts_afresh):
        """Move a limit to where it is met, or below what is spent; what was counted stays, unless it counts anew."""
        tenant = self.tenants[tenant_id]
        if not tenant.budgets:
            return
        number = data.draw(st.integers(0, len(tenant.budgets) - 1))
        spec = tenant.budgets[number]
        window = bounds(spec, self.now_ms)
        subject = data.draw(st.sampled_from([*KEY_IDS, "a", "b", "s:1", "u2"])) if spec.each else ""
        key = read_name(counter_name(spec, window, subject)).key if window else ""
        counter = self.shard.counters.get((tenant_id, key), Counter())
        limit_nanos = min(max(counter.spent + counter.held + room_nanos, 0), COUNTER_NANOS_MAX)
        edited = replace(spec, limit_nanos=limit_nanos, spec_version=spec.spec_version + counts_afresh)
        budgets = (*tenant.budgets[:number], edited, *tenant.budgets[number + 1 :])
        self.tenants[tenant_id] = replace(tenant, budgets=budgets, version=tenant.version + 1)
        self.publish(self.tenants[tenant_id])

    @rule(
        tenant_id=st.sampled_from(TENANTS),
        key_id=st.sampled_from(KEY_IDS),
        limits=st.fixed_dictionaries(
            {
                "requests_per_minute": st.sampled_from([None, 0, 2]),
                "concurrent_calls": st.sampled_from([None, 0, 2]),
                "tokens_per_minute": st.sampled_from([None, 0, 60]),
            }
        ),
        newer=st.sampled_from([0, 1, 1]),
    )
    def change_key(self, tenant_id, key_id, limits, newer):
        version = self.api_keys[(tenant_id, key_id)].version + newer
        key = a_key(tenant_id, key_id, version, **limits)
        self.publish(key)
        self.api_keys[(tenant_id, key_id)] = key

    @rule(tenant_id=st.sampled_from([*TENANTS, NOBODY]), key_id=st.sampled_from([*KEY_IDS, "none"]))
    def load_records(self, tenant_id, key_id):
        found = self.run(self.counters.load_records(tenant_id, key_id))
        if not isinstance(found, NotReady):
            found = tuple(None if record is None else record.version for record in (found.tenant, found.key))
        assert found == reference.load_records(self.shard, tenant_id=tenant_id, key_id=key_id, run_id=self.run_id)

    @rule(
        tenant_id=st.sampled_from(TENANTS),
        key_id=st.sampled_from(KEY_IDS),
        operation_id=st.sampled_from(OPERATIONS),
        input_nanos=AMOUNTS,
        output_femtos=FEMTOS,
        tokens=st.tuples(st.integers(0, 100), st.integers(0, 5000)).map(sorted),
        counts=st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 1, 3])),
        eighth=st.booleans(),
        skew_ms=st.sampled_from([0, 0, 0, 0, 0, 0, -3000, 1500, -70_000, LATE]),
        whose=WHOSE,
    )
    def reserve(
        self, tenant_id, key_id, operation_id, input_nanos, output_femtos, tokens, counts, eighth, skew_ms, whose
    ):
        # Ours is ahead of Redis' clock, so being late is being behind that one.
        now_ms = self.now_ms + skew_ms if skew_ms is not LATE else int(time.time() * 1000) - 2000
        request = Reserve(
            facts=replace(the_facts(operation_id, tenant_id=tenant_id, key_id=key_id, held_at_ms=now_ms), **whose),
            tenant=self.tenants[tenant_id],
            key=self.api_keys[(tenant_id, key_id)],
            now_ms=now_ms,
            input_nanos=input_nanos,
            output_femtos=output_femtos,
            output_tokens=tokens[1],
            output_tokens_min=tokens[0],
            input_tokens=counts[0],
            choices=counts[1],
            eighth=eighth,
        )
        self.ask(request)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def ask_again(self, data):
        self.ask(self.asked[data.draw(st.sampled_from(sorted(self.asked)))])

    def ask(self, request):
        answer = self.run(self.counters.reserve(request))
        expected = reserving.reserve(
            self.shard, request, run_id=self.run_id, redis_ms=int(time.time() * 1000), backlog_max=BACKLOG_MAX
        )
        assert answer == expected, (answer, expected)
        if isinstance(answer, Reserved):
            names = (request.facts.tenant_id, request.facts.operation_id)
            self.asked[names], self.told[names] = request, answer

    @rule(
        tenant_id=st.sampled_from(TENANTS),
        operation_id=st.sampled_from(OPERATIONS),
        end=st.sampled_from([End.ESTIMATED, End.CONFIRMED, End.CORRECTED, End.RELEASED]),
        amount_nanos=AMOUNTS,
        astray=st.sampled_from([False, False, False, True]),
        age_ms=st.sampled_from([0, HOUR_MS]),
        usage=st.sampled_from([None, Usage(input_tokens=5, output_tokens=0)]),
        detail=st.text(max_size=5),
        replaces=st.sampled_from([0, 1, 2, 3]),
    )
    def settle(self, tenant_id, operation_id, end, amount_nanos, astray, age_ms, usage, detail, replaces):
        request, told = self.asked.get((tenant_id, operation_id)), self.told.get((tenant_id, operation_id))
        if request is None or told is None or astray:
            # Somebody who knows little: wrong counters, another hold.
            specs = self.tenants[tenant_id].budgets
            names = (
                *(counter_name(s, w, "who") for s in specs if (w := bounds(s, self.now_ms - age_ms)) is not None),
                tokens_counter_name("", self.now_ms - age_ms),
                calls_counter_name(""),
            )
            facts = the_facts(operation_id, tenant_id=tenant_id, held_at_ms=self.now_ms - age_ms)
            handoff = a_handoff(facts, counters=names, hold_nanos=77)
        else:
            handoff = a_handoff(request.facts, counters=told.counters, hold_nanos=told.hold_nanos)
        settlement = a_settlement(
            handoff,
            0 if end is End.RELEASED else amount_nanos,
            end,
            usage=usage,
            ended_at_ms=self.now_ms,
            detail=detail.encode(errors="replace").decode(),
            replaces=replaces if end is End.CORRECTED else 0,
        )
        answer = self.run(self.counters.settle(settlement, now_ms=self.now_ms))
        assert answer == reference.settle(self.shard, settlement, now_ms=self.now_ms, run_id=self.run_id)
        assert answer == self.run(self.counters.settle(settlement, now_ms=self.now_ms))

    @rule(
        tenant_id=st.sampled_from(TENANTS),
        operation_id=st.sampled_from(OPERATIONS),
        behind_ms=st.sampled_from([0, 5000]),
    )
    def renew(self, tenant_id, operation_id, behind_ms):
        which = {"tenant_id": tenant_id, "operation_id": operation_id, "now_ms": self.now_ms - behind_ms}
        assert self.run(self.counters.renew(**which)) == reference.renew(self.shard, **which)

    @precondition(lambda self: self.shard.leases)
    @rule(
        data=st.data(),
        more_nanos=st.one_of(SMALL, SMALL, st.integers(-10, 0), AROUND_2_53),
        fitting=st.sampled_from([None, None, 0, 1]),
        astray=st.sampled_from([False, False, False, True]),
        force=st.sampled_from([False, False, True]),
        tokens=st.sampled_from([0, 50, 5000]),
    )
    def extend(self, data, more_nanos, fitting, astray, force, tokens):
        tenant_id, operation_id = data.draw(st.sampled_from(sorted(self.shard.leases)))
        known = self.shard.operations[(tenant_id, operation_id)]
        if fitting is not None:
            # Exactly what the tightest budget leaves, or a nano more.
            names = [read_name(counter) for counter in known.counters]
            used = [as_of(self.shard.counters.get((tenant_id, name.key), Counter()), name) for name in names]
            lefts = [
                counter.left_of(limit.limit_nanos)
                for limit, counter, name in zip(known.limits, used, names, strict=True)
                if name.unit is Unit.NANOS
            ]
            more_nanos = min(lefts, default=more_nanos) + fitting
        self.ask_to_extend(
            tenant_id, operation_id, known.hold_nanos + more_nanos, known.counters, astray, force, tokens
        )

    @rule(tenant_id=st.sampled_from(TENANTS), operation_id=st.sampled_from(OPERATIONS), hold_nanos=AMOUNTS)
    def extend_what_may_not_be_held(self, tenant_id, operation_id, hold_nanos):
        self.ask_to_extend(tenant_id, operation_id, hold_nanos, (), astray=False, force=False)

    def ask_to_extend(self, tenant_id, operation_id, hold_nanos, counters, astray, force, tokens=0):
        extension = Extension(
            tenant_id=tenant_id,
            operation_id=operation_id,
            counters=("b9:1:0:",) if astray else counters,
            hold_nanos=min(max(hold_nanos, 0), CALL_NANOS_MAX),
            hold_tokens=tokens,
            force=force,
        )
        answer = self.run(self.counters.extend(extension))
        assert answer == reference.extend(self.shard, extension, run_id=self.run_id)
        assert answer == self.run(self.counters.extend(extension))

    @rule(step_ms=st.sampled_from([0, LEASE_MS - 1, LEASE_MS]), limit=st.sampled_from([1, 10]))
    def expire(self, step_ms, limit):
        self.now_ms += step_ms
        leases = sorted(self.shard.leases.items(), key=lambda row: (row[1], keys.lease_member(*row[0])))
        due = [names for names, until_ms in leases if until_ms <= self.now_ms][:limit]
        assert self.run(self.counters.due_shards(now_ms=self.now_ms)) == ([SHARD] if due else [])
        expired = self.run(self.counters.expire_due(SHARD, now_ms=self.now_ms, limit=limit))
        assert expired == sum(
            reference.expire(self.shard, tenant_id=t, operation_id=o, now_ms=self.now_ms, run_id=self.run_id)
            for t, o in due
        )

    @rule(step_ms=st.sampled_from([200, 1000, 20_000, 61_000, 24 * HOUR_MS, 31 * 24 * HOUR_MS]))
    def let_time_pass(self, step_ms):
        self.now_ms += step_ms

    @rule()
    def drain(self):
        self.run(self.redis.command("XTRIM", keys.usage(SHARD), "MAXLEN", 0))
        self.shard.events.clear()

    @rule(tenant_id=st.sampled_from(TENANTS), operation_id=st.sampled_from(OPERATIONS))
    def forget_a_marker(self, tenant_id, operation_id):
        marker = self.shard.operations.get((tenant_id, operation_id))
        if marker is not None and marker.end is not None:
            del self.shard.operations[(tenant_id, operation_id)]
            self.run(self.redis.command("DEL", keys.operation(tenant_id, operation_id)))

    @rule(data=st.data(), spent=COUNTED, held=COUNTED)
    def fill_a_counter(self, data, spent, held):
        plain = [names for names in sorted(self.shard.counters) if ":~" not in names[1]]
        if plain:
            names = data.draw(st.sampled_from(plain))
            self.shard.counters[names] = Counter(spent, held, self.shard.counters[names].seed)
            self.run(self.redis.command("HSET", keys.counter(*names), "spent", spent, "held", held))

    @precondition(lambda self: self.shard.epoch == self.run_id)
    @rule(really=st.sampled_from([False, False, True]), run_id=st.sampled_from(["", "the process before"]))
    def close(self, really, run_id):
        if really:
            self.begin_opening(run_id or self.run_id)

    def begin_opening(self, run_id):
        self.opening = self.run(self.epoch.begin_opening([SHARD], run_id))
        self.shard.epoch = self.opening.name

    @precondition(lambda self: self.shard.epoch not in (self.run_id, None))
    @rule()
    def lose_the_opening(self):
        self.run(self.redis.command("DEL", keys.epoch(SHARD)))
        self.shard.epoch = None

    @precondition(lambda self: self.shard.epoch != self.run_id)
    @rule(ahead=st.integers(-1, 1), rebuilt=st.booleans())
    def sign_off(self, ahead, rebuilt):
        newest = self.run(newest_event(self.redis, SHARD))
        position = (newest[0], max(newest[1] + ahead, 0))
        answer = self.run(self.epoch.sign_off(self.opening, SHARD, position=position, rebuilt=rebuilt))
        assert answer is reference.sign_off(
            self.shard,
            opening=self.opening.name,
            began_with=self.opening.run_id,
            run_id=self.run_id,
            newest_event=newest,
            position=position,
            rebuilt=rebuilt,
        )
        # What comes next is numbered after what the ledger has.
        opened_behind = answer is SignOff.OPENED and position > newest
        assert self.run(newest_event(self.redis, SHARD)) == (position if opened_behind else newest)
        if answer is SignOff.LOST:
            self.begin_opening(self.run_id)

    def draw_counter(self, data, amounts):
        """Draw a counter that is in use or not, and an amount for it or for some of its buckets."""
        used = {(tenant_id, name) for (tenant_id, _), told in self.told.items() for name in told.counters}
        rolling = f"b9:1:~1000x61:{self.now_ms // 1000}:"
        tenant_id, counter = data.draw(
            st.sampled_from([*sorted(used), (TENANTS[0], "b9:1:0:"), (TENANTS[0], rolling + "u")])
        )
        name = read_name(counter)
        if name.buckets is None:
            return tenant_id, counter, data.draw(amounts)
        buckets = st.integers(0, name.buckets.number + 2).map(lambda back: name.bucket - back)
        return tenant_id, counter, data.draw(st.dictionaries(buckets, st.integers(0, 2000), max_size=4))

    @rule(data=st.data())
    def rebuild_a_counter(self, data):
        tenant_id, counter, spent = self.draw_counter(data, COUNTED)
        written = self.run(self.epoch.write_counter(self.opening, tenant_id, counter, spent, now_ms=self.now_ms))
        assert written == reference.write_counter(
            self.shard, tenant_id=tenant_id, counter=counter, spent=spent, opening=self.opening.name
        )
        self.remember_subject(tenant_id, counter, known=written)

    def remember_subject(self, tenant_id, counter, *, known):
        """A template's counter that was not made by a call makes its subject known all the same."""
        name = read_name(counter)
        if known and name.subject is not None and name.unit is Unit.NANOS:
            seen = self.shard.subjects.setdefault((tenant_id, template_of(name)), {})
            seen.setdefault(name.subject, self.now_ms)

    @rule(data=st.data(), seed=st.one_of(st.just(0), SMALL), outdated=st.sampled_from([False, False, True]))
    def correct_a_counter(self, data, seed, outdated):
        tenant_id, counter, deltas = self.draw_counter(data, st.one_of(st.integers(-2000, 2000), LIMITS))
        generation = self.run(self.redis.command("GET", keys.generation(SHARD))) or ""
        corrected = self.run(
            self.book.correct(
                tenant_id,
                counter,
                deltas,
                seed=seed,
                generation="another" if outdated else generation,
                now_ms=self.now_ms,
            )
        )
        if outdated:
            assert not corrected
        else:
            assert corrected == reference.correct_counter(
                self.shard, tenant_id=tenant_id, counter=counter, deltas=deltas, seed=seed, run_id=self.run_id
            )
        self.remember_subject(tenant_id, counter, known=corrected)

    @rule(tenant_id=st.sampled_from(TENANTS), operation_id=st.sampled_from(OPERATIONS), amount_nanos=AMOUNTS)
    def remember_an_end(self, tenant_id, operation_id, amount_nanos):
        remembered = RememberedEnd(
            tenant_id=tenant_id,
            operation_id=operation_id,
            end=End.ESTIMATED,
            amount_nanos=amount_nanos,
            hold_nanos=9,
            sequence=2,
            counters=("b9:1:0:",),
            tokens=4,
        )
        assert self.run(self.epoch.remember_ended(self.opening, remembered)) == reference.remember_ended(
            self.shard, remembered, opening=self.opening.name
        )

    @invariant()
    def redis_is_in_the_state_of_the_reference(self):
        expected = replace(self.shard, requests={n: m for n, m in self.shard.requests.items() if m.counts})
        found = self.run(read_shard(self.redis))
        assert found == expected, differences(found, expected)


def differences(found: Shard, expected: Shard) -> list[object]:
    return [
        (name, here, there)
        for name in ("epoch", "records", "counters", "operations", "leases", "requests", "subjects", "events")
        if (here := getattr(found, name)) != (there := getattr(expected, name))
    ]


async def read_shard(redis: RedisClient) -> Shard:
    """Read all that Redis has, in the reference's words."""
    found = Shard()
    names = sorted(await redis.command("KEYS", "*"))
    others = (":operation:", ":subjects:")
    hashes = [
        name
        for name in names
        if not name.endswith((":epoch", ":generation", ":leases", ":usage"))
        and not any(kind in name for kind in others)
    ]
    sets = [name for name in names if ":subjects:" in name]
    texts = [name for name in names if ":operation:" in name]
    fields = [dict(zip(r[::2], r[1::2], strict=True)) for r in await redis.pipeline([("HGETALL", n) for n in hashes])]
    for name, values in zip(hashes, fields, strict=True):
        prefix, tag, kind, *escaped = name.split(":")
        assert (prefix, tag) == ("bg", f"{{{SHARD:02x}}}")
        parts = tuple(unquote(part) for part in escaped)
        if kind in {"tenant", "key"}:
            found.records[parts] = int(values["version"])
        elif kind == "counter":
            found.counters[parts] = counter_of(values)
        else:
            assert kind in {"requests", "key-requests"}
            bounds_of = {field: int(values.pop(field)) for field in ("total", "first", "last")}
            found.requests[parts] = Minute(**bounds_of, counts={int(at): int(n) for at, n in values.items()})
    for name in sets:
        *_, tenant_id, template = name.split(":")
        members = await redis.command("ZRANGE", name, 0, -1, "WITHSCORES")
        seen = {member: int(float(score)) for member, score in zip(members[::2], members[1::2], strict=True)}
        found.subjects[(unquote(tenant_id), unquote(template))] = seen
    for name, text in zip(texts, await redis.pipeline([("GET", name) for name in texts]), strict=True):
        found.operations[tuple(unquote(part) for part in name.split(":")[3:])] = read_operation(operation_of(text))
    found.epoch = await redis.command("GET", keys.epoch(SHARD))
    leases = await redis.command("ZRANGE", keys.leases(SHARD), 0, -1, "WITHSCORES")
    for member, score in zip(leases[::2], leases[1::2], strict=True):
        found.leases[keys.split_lease_member(member)] = int(float(score))
    for _, event in await redis.command("XRANGE", keys.usage(SHARD), "-", "+"):
        found.events.append(UsageEvent.from_fields(dict(zip(event[::2], event[1::2], strict=True))))
    return found


def read_limit(line) -> CounterLimit:
    limit_nanos, _, whose = line.partition(" ")
    return CounterLimit.read(int(limit_nanos), whose)


def told_of(values) -> Reserved:
    hold, tokens, *told = values["told"].split("\x1e")
    return reserve_answer(None, (), ["RESERVED", hold, tokens, values["counters"], *told])


def read_operation(values) -> Operation:
    counters = split_counters(values["counters"])
    if values["state"] == "HELD":
        return Operation(
            hold_nanos=int(values["hold"]),
            tokens=int(values["tokens"]),
            counters=counters,
            facts=facts_from_json(values["facts"]),
            asked=values["asked"],
            told=told_of(values),
            limits=tuple(map(read_limit, split_counters(values["limits"]))),
        )
    return Operation(
        hold_nanos=int(values["hold"]),
        tokens=int(values["tokens"]),
        counters=counters,
        end=End(values["state"]),
        amount_nanos=int(values["amount"]),
        sequence=int(values["sequence"]),
        forgotten=values["forgotten"] == "1",
    )


async def test_redis_answers(redis_server):
    await redis_server.wait_until_ready()


def test_each_script_does_what_its_reference_does(redis_server):
    Scripts.url = redis_server.url
    run_state_machine_as_test(
        Scripts, settings=settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
    )
