"""All tables of the product in one metadata, for migrations and for tests that compare the two."""

from controller.access import tables as access
from controller.accounts import tables as accounts
from controller.desired import tables as desired
from controller.events import tables as events
from controller.fleet import tables as fleet
from controller.store import tables as store
from controller.store.types import Table
from controller.tunnels import tables as tunnels
from controller.usage import tables as usage

__all__ = ["access", "accounts", "desired", "events", "fleet", "store", "tunnels", "usage"]

metadata = Table.metadata
