"""tunnels of ssh"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("credentials", sa.Column("tunnel", sa.BigInteger(), nullable=True))
    op.create_index("ix_credentials_tunnel", "credentials", ["tunnel"], unique=True)


def downgrade() -> None:
    op.drop_index("ix_credentials_tunnel", table_name="credentials")
    with op.batch_alter_table("credentials", schema=None) as batch_op:
        batch_op.drop_column("tunnel")
