"""Whose spend a ledger row is, beyond its key: the call's tags with their ancestors, its session and its end user."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM usage_ledger WHERE tags <> '[]' OR session_id <> '' OR end_user <> '') THEN
            RAISE EXCEPTION 'downgrade refused: ledger rows name tags, sessions or end users, and would lose them'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    # Constant defaults: no row is rewritten.
    op.execute(
        "ALTER TABLE usage_ledger ADD COLUMN tags jsonb NOT NULL DEFAULT '[]', "
        "ADD COLUMN session_id text NOT NULL DEFAULT '', ADD COLUMN end_user text NOT NULL DEFAULT ''"
    )


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("ALTER TABLE usage_ledger DROP COLUMN tags, DROP COLUMN session_id, DROP COLUMN end_user")
