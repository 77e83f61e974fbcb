import pytest

from tests.e2e import admin


@pytest.fixture
def new_tenant(stack):
    """Make tenants with a key and budgets on the stack; their administrator's connections are closed afterwards."""
    made = []

    def make(*budgets, rate=0):
        tenant = admin.new_tenant(stack.base_url, stack.admin_key, *budgets, rate=rate)
        made.append(tenant)
        return tenant

    yield make
    for tenant in made:
        tenant.http.close()
