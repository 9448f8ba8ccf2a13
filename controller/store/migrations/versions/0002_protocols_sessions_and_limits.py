"""protocols sessions and limits"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "fleet_keys",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("sealed_key", sa.LargeBinary(), nullable=False),
        sa.Column("certificate", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_fleet_keys")),
    )
    op.create_table(
        "protocols",
        sa.Column("protocol", sa.String(length=255), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("port", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("protocol", "node_id", name=op.f("pk_protocols")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_events_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_events_user_id"), ["user_id"], unique=False)

    op.create_table(
        "leases",
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("ledger", sa.String(length=255), nullable=False),
        sa.Column("allowance", sa.BigInteger(), nullable=False),
        sa.Column("reserved", sa.BigInteger(), nullable=False),
        sa.Column("used", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_leases_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("node_id", "user_id", name=op.f("pk_leases")),
    )
    op.create_table(
        "limits",
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("quota_bytes", sa.BigInteger(), nullable=True),
        sa.Column("quota_period", sa.String(length=255), nullable=False),
        sa.Column("period_ends_at", sa.BigInteger(), nullable=True),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("max_sessions", sa.BigInteger(), nullable=True),
        sa.Column("rate_up", sa.BigInteger(), nullable=True),
        sa.Column("rate_down", sa.BigInteger(), nullable=True),
        sa.Column("told", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_limits_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_limits")),
    )
    with op.batch_alter_table("limits", schema=None) as batch_op:
        batch_op.create_index("ix_limits_expires", ["expires_at"], unique=False)
        batch_op.create_index("ix_limits_period", ["period_ends_at"], unique=False)

    op.create_table(
        "usage",
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("protocol", sa.String(length=255), nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("rx", sa.BigInteger(), nullable=False),
        sa.Column("tx", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_usage_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", "node_id", "protocol", "hour", name=op.f("pk_usage")),
    )
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.create_index("ix_usage_hour", ["hour"], unique=False)

    op.create_table(
        "vpn_sessions",
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("protocol", sa.String(length=255), nullable=False),
        sa.Column("username", sa.String(length=255), nullable=False),
        sa.Column("connection_id", sa.String(length=255), nullable=True),
        sa.Column("remote", sa.String(length=255), nullable=False),
        sa.Column("address", sa.String(length=255), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("end_reason", sa.String(length=255), nullable=True),
        sa.Column("rx", sa.BigInteger(), nullable=False),
        sa.Column("tx", sa.BigInteger(), nullable=False),
        sa.Column("exact", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_vpn_sessions_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("node_id", "id", name=op.f("pk_vpn_sessions")),
    )
    with op.batch_alter_table("vpn_sessions", schema=None) as batch_op:
        batch_op.create_index("ix_vpn_sessions_ended", ["ended_at"], unique=False)
        batch_op.create_index("ix_vpn_sessions_started", ["started_at"], unique=False)
        batch_op.create_index("ix_vpn_sessions_user", ["user_id", "ended_at"], unique=False)

    op.create_table(
        "credentials",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("protocol", sa.String(length=255), nullable=False),
        sa.Column("username", sa.String(length=255), nullable=False),
        sa.Column("connection_id", sa.String(length=36), nullable=True),
        sa.Column("node_id", sa.String(length=36), nullable=True),
        sa.Column("sealed_secret", sa.LargeBinary(), nullable=False),
        sa.Column("public_keys", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("certificate", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_password", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_private_key", sa.LargeBinary(), nullable=True),
        sa.Column("sealed_tls_crypt", sa.LargeBinary(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["connection_id"], ["connections.id"], name=op.f("fk_credentials_connection_id")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_credentials_node_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_credentials_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint("connection_id", name=op.f("uq_credentials_connection_id")),
        sa.UniqueConstraint("protocol", "username", name="uq_credentials_username"),
    )
    with op.batch_alter_table("credentials", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_credentials_user_id"), ["user_id"], unique=False)

    with op.batch_alter_table("applied", schema=None) as batch_op:
        batch_op.add_column(sa.Column("servers", sa.Text(), server_default="{}", nullable=False))

    with op.batch_alter_table("nodes", schema=None) as batch_op:
        batch_op.add_column(sa.Column("protocols", sa.String(length=255), server_default="wireguard", nullable=False))
        batch_op.add_column(
            sa.Column("allowed", sa.String(length=255), server_default="wireguard openvpn ssh l2tp", nullable=False)
        )
        batch_op.add_column(sa.Column("ssh_host_keys", sa.Text(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("ledger", sa.String(length=255), server_default="", nullable=False))

    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.add_column(sa.Column("protocols", sa.String(length=255), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("users", schema=None) as batch_op:
        batch_op.drop_column("protocols")

    with op.batch_alter_table("nodes", schema=None) as batch_op:
        batch_op.drop_column("ledger")
        batch_op.drop_column("ssh_host_keys")
        batch_op.drop_column("allowed")
        batch_op.drop_column("protocols")

    with op.batch_alter_table("applied", schema=None) as batch_op:
        batch_op.drop_column("servers")

    with op.batch_alter_table("credentials", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_credentials_user_id"))

    op.drop_table("credentials")
    with op.batch_alter_table("vpn_sessions", schema=None) as batch_op:
        batch_op.drop_index("ix_vpn_sessions_user")
        batch_op.drop_index("ix_vpn_sessions_started")
        batch_op.drop_index("ix_vpn_sessions_ended")

    op.drop_table("vpn_sessions")
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.drop_index("ix_usage_hour")

    op.drop_table("usage")
    with op.batch_alter_table("limits", schema=None) as batch_op:
        batch_op.drop_index("ix_limits_period")
        batch_op.drop_index("ix_limits_expires")

    op.drop_table("limits")
    op.drop_table("leases")
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_events_user_id"))

    op.drop_table("events")
    op.drop_table("protocols")
    op.drop_table("fleet_keys")
