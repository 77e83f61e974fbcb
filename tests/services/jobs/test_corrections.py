"""One operation's corrections on real counters and a real ledger: who comes second is told so, not that all is down."""

import pytest

from budgetguard.adapters.postgres.audit_trail import AuditTrail
from budgetguard.adapters.postgres.ledger_reader import LedgerReader
from budgetguard.core.entities import LedgerFilter
from budgetguard.core.errors import OperationChangedError
from budgetguard.core.operation import End
from control_plane.corrections import Corrections
from tests.services.jobs.conftest import now_ms


async def drain_all(plane) -> None:
    while await plane.drain().run_once():
        pass


class ReadEarlier(LedgerReader):
    """How operations stood when it was made, whatever was corrected since."""

    def __init__(self, database, rows) -> None:
        super().__init__(database)
        self.rows = rows

    async def standing(self, _wanted, **_limits):
        return self.rows


@pytest.fixture
async def corrections(plane):
    """Corrections as they are made, and those of somebody who has read the ledger before them."""
    await plane.make_tenant()
    await plane.call("op-1", 60)
    await drain_all(plane)
    reader = LedgerReader(plane.database)
    rows = await reader.standing(LedgerFilter(operation_id="op-1"), limit=1)

    class Drained:
        """The ledger has all as soon as it is asked, and the counters follow."""

        async def ledger_has_all(self, _tenant_id):
            await drain_all(plane)
            return True

        async def follow(self, tenant_id):
            return await plane.reconciler.follow(tenant_id)

    def corrections_by(ledger):
        audit = AuditTrail(plane.database)
        return Corrections(ledger=ledger, counting=Drained(), counters=plane.counters, audit=audit, now_ms=now_ms)

    return corrections_by(reader), corrections_by(ReadEarlier(plane.database, rows))


def correct(corrections, amount_nanos, reason="why"):
    return corrections.correct_one("op-1", amount_nanos=amount_nanos, reason=reason, actor="a")


async def test_of_two_different_ones_the_second_is_a_conflict(plane, corrections):
    first, late = corrections
    made = await correct(first, 10)
    assert (made.before.end, made.before.amount_nanos, made.row.amount_nanos) == (End.CONFIRMED, 60, 10)
    with pytest.raises(OperationChangedError) as conflict:
        await correct(late, 20)
    assert conflict.value.grpc_code == "ABORTED"
    assert await plane.in_ledger() == 10
    assert (await correct(first, 20)).before == made.row
    assert await plane.in_ledger() == 20


async def test_of_two_alike_the_second_is_told_what_the_first_was(plane, corrections):
    first, late = corrections
    made = await correct(first, 10)
    assert await correct(late, 10) == made
    assert await correct(first, 10) == made
    assert await correct(first, 10, reason="another one") == made
    assert len((await LedgerReader(plane.database).list(LedgerFilter(operation_id="op-1"))).items) == 2
    again = await correct(first, 30)
    assert (again.row.sequence, again.before) == (made.row.sequence + 1, made.row)


async def test_an_amount_that_is_only_assumed_is_made_final_by_a_row_of_its_own(plane, corrections):
    first, _ = corrections
    made = await correct(first, 60)
    assert (made.row.end, made.row.delta_nanos, made.before.end) == (End.CORRECTED, 0, End.CONFIRMED)
    assert await plane.in_ledger() == 60
