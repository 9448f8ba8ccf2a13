"""All tables of the product in one metadata, for migrations and for tests that compare the two."""

from controller.accounts import tables as accounts
from controller.desired import tables as desired
from controller.fleet import tables as fleet
from controller.store import tables as store
from controller.store.types import Table
from controller.tunnels import tables as tunnels

__all__ = ["accounts", "desired", "fleet", "store", "tunnels"]

metadata = Table.metadata
