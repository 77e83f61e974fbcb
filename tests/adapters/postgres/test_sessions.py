import pytest

from budgetguard.adapters.postgres import sessions as module
from budgetguard.adapters.postgres.sessions import SessionRepository
from budgetguard.adapters.postgres.tenants import TenantRepository
from budgetguard.core.entities import Session, SessionStatus
from budgetguard.core.errors import InvalidError, NotFoundError
from budgetguard.core.operation import End
from tests.plugins.usage_events import NOW_MS, a_delivery

INACTIVE, ACTIVE = SessionStatus.INACTIVE, SessionStatus.ACTIVE


@pytest.fixture
def sessions(database):
    return SessionRepository(database)


@pytest.fixture(autouse=True)
async def tenants(database):
    tenants = TenantRepository(database)
    for tenant_id in ("acme", "other"):
        await tenants.create(actor="a", tenant_id=tenant_id, name=tenant_id)
    return tenants


@pytest.fixture
def called(ledger):
    async def called(operation_id, session_id, **changes):
        await ledger.insert_events([a_delivery(operation_id, session_id=session_id, **changes)])

    return called


async def test_a_session_is_what_its_calls_in_the_ledger_tell(sessions, called):
    await called("op-1", "s1", held_at_ms=NOW_MS, delta_nanos=100, session_name="First", session_path="/a")
    await called("op-2", "s1", held_at_ms=NOW_MS + 10, delta_nanos=30, end=End.ESTIMATED, session_name="Second")
    await called("op-2", "s1", held_at_ms=NOW_MS + 10, delta_nanos=-5, sequence=2, amount_nanos=25)
    await called("op-3", "s2", held_at_ms=NOW_MS)
    await called("op-4", "s1", tenant_id="other")
    await called("op-5", "")
    assert await sessions.get("acme", "s1") == Session(
        tenant_id="acme",
        session_id="s1",
        status=ACTIVE,
        name="Second",
        path="/a",
        first_call_at_ms=NOW_MS,
        last_call_at_ms=NOW_MS + 10,
        calls=2,
        spent_nanos=125,
    )
    assert [session.session_id for session in (await sessions.list("acme")).items] == ["s1", "s2"]
    assert [session.calls for session in (await sessions.list("other")).items] == [1]


async def test_what_is_not_there_is_not_found(sessions):
    for tenant_id in ("acme", "nobody"):
        with pytest.raises(NotFoundError):
            await sessions.get(tenant_id, "s1")
    with pytest.raises(NotFoundError):
        await sessions.list("nobody")
    with pytest.raises(NotFoundError):
        await sessions.set_status("nobody", "s1", INACTIVE, actor="x")
    assert (await sessions.list("acme")).items == ()


async def test_a_deactivated_session_reaches_the_record_and_can_come_back(sessions, tenants, owner):
    closed = await sessions.set_status("acme", "not yet called", INACTIVE, actor="x")
    assert (closed.status, closed.calls, closed.first_call_at_ms) == (INACTIVE, 0, None)
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.version, snapshot.closed_sessions) == (2, ("not yet called",))
    assert await sessions.get("acme", "not yet called") == closed
    assert (await sessions.list("acme")).items == (closed,)
    await sessions.set_status("acme", "not yet called", INACTIVE, actor="x")
    await sessions.set_status("acme", "never closed", ACTIVE, actor="x")
    assert (await tenants.get("acme")).version == 2
    opened = await sessions.set_status("acme", "not yet called", ACTIVE, actor="x")
    assert opened.status is ACTIVE
    snapshot = await tenants.snapshot("acme")
    assert (snapshot.version, snapshot.closed_sessions) == (3, ())
    assert (await tenants.snapshot("other")).closed_sessions == ()
    actions = await owner.fetch("SELECT action FROM admin_audit WHERE kind = 'session' ORDER BY audit_id")
    assert [row["action"] for row in actions] == ["deactivate", "reactivate"]


@pytest.mark.parametrize("session_id", ["", " ", "s ", "a\nb", "s" * 201])
async def test_an_id_that_no_call_can_have_is_refused(sessions, session_id):
    with pytest.raises(InvalidError) as invalid:
        await sessions.set_status("acme", session_id, INACTIVE, actor="x")
    assert invalid.value.violations[0].field == "session_id"


async def test_closed_sessions_are_bounded(sessions, tenants, monkeypatch):
    monkeypatch.setattr(module, "CLOSED_SESSIONS_MAX", 1)
    await sessions.set_status("acme", "s1", INACTIVE, actor="x")
    with pytest.raises(InvalidError, match="at most 1 deactivated"):
        await sessions.set_status("acme", "s2", INACTIVE, actor="x")
    assert (await tenants.snapshot("acme")).closed_sessions == ("s1",)
    await sessions.set_status("acme", "s1", ACTIVE, actor="x")
    await sessions.set_status("acme", "s2", INACTIVE, actor="x")


async def test_pages_hold_each_session_once_called_or_closed(sessions, called):
    for number in range(7):
        await called(f"op-{number}", f"s{number}")
        await called(f"again-{number}", f"s{number}")
    for session_id in ("s3", "s3b", "zz", "S0"):
        await sessions.set_status("acme", session_id, INACTIVE, actor="x")
    seen, token, pages = [], "", 0
    while not pages or token:
        page = await sessions.list("acme", page_size=3, page_token=token)
        seen += page.items
        token, pages = page.next_page_token, pages + 1
    assert pages == 4
    assert sorted(one.session_id for one in seen) == sorted([*(f"s{n}" for n in range(7)), "s3b", "zz", "S0"])
    assert {one.session_id for one in seen if one.status is INACTIVE} == {"s3", "s3b", "zz", "S0"}
    assert {one.calls for one in seen} == {0, 2}
