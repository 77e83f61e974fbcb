import pytest

from budgetguard.adapters.postgres.ledger import LedgerRepository
from tests.plugins.usage_events import a_delivery


@pytest.fixture
def ledger(database):
    return LedgerRepository(database)


@pytest.fixture
def ledger_row(ledger):
    async def add(operation_id: str = "op-1", **changes):
        return await ledger.insert_events([a_delivery(operation_id, **changes)])

    return add
