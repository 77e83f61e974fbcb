"""Which model's price a call was charged by, beside the model that it named: budgets of models count by both."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

REFUSE_TO_FORGET = """
    DO $$
    BEGIN
        IF EXISTS (SELECT FROM usage_ledger WHERE priced_model NOT IN ('', model)) THEN
            RAISE EXCEPTION 'downgrade refused: ledger rows name the model that they are priced as'
                USING HINT = 'Drop the database if that is what you mean.';
        END IF;
    END $$
"""


def upgrade() -> None:
    # A constant default: no row is rewritten. An older row says nothing, which means its model.
    op.execute("ALTER TABLE usage_ledger ADD COLUMN priced_model text NOT NULL DEFAULT ''")


def downgrade() -> None:
    op.execute(REFUSE_TO_FORGET)
    op.execute("ALTER TABLE usage_ledger DROP COLUMN priced_model")
