"""Of which operation a discarded dead event was: what later events of it say is a difference to what no row has."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM dead_events WHERE operation_id <> '') THEN
            RAISE EXCEPTION 'downgrade refused: dead events were ended, and whose later events are differences to them '
                'would be forgotten' USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    # Written by the discard. An event that was discarded before stays without: what is ended never changes.
    op.execute(
        """
        ALTER TABLE dead_events ADD COLUMN operation_id text NOT NULL DEFAULT '',
            ADD CHECK (operation_id = '' OR state = 'DISCARDED')
        """
    )
    # Of hashes: it is told by what may be anything, also too long for another index, and must still be discarded.
    op.execute("CREATE INDEX dead_events_discarded ON dead_events USING hash (operation_id) WHERE operation_id <> ''")
    op.execute("GRANT UPDATE (operation_id) ON dead_events TO budgetguard_app")


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("ALTER TABLE dead_events DROP COLUMN operation_id")
