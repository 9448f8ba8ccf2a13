"""What works on the database alone: enough for a command beside the running controller, and what it is built upon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from controller.access.members import Members
from controller.access.service import Access
from controller.accounts.administration import Administration
from controller.accounts.newpassword import PasswordChanges
from controller.accounts.passwords import Passwords
from controller.accounts.service import Accounts
from controller.config import Config, read_secrets
from controller.fleet import ca
from controller.fleet.ca import Authority
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings, ProtocolPools
from controller.fleet.vpnkeys import VpnKeys, load_keys
from controller.store.database import Database, Transaction, open_database
from controller.store.migrate import migrate
from controller.store.types import new_id
from controller.tunnels import ending
from controller.tunnels.addresses import Pool
from controller.tunnels.peers import Peers
from controller.usage import granting
from controller.usage.book import Book
from controller.usage.limits import Limits, Refresh
from controller.usage.records import Records
from controller.usage.sessions import Sessions
from shared.services import most_tunnels


@dataclass(frozen=True, slots=True)
class Services:
    database: Database
    authority: Authority
    fleet_settings: FleetSettings
    fleet: Fleet
    passwords: Passwords
    accounts: Accounts
    administration: Administration
    members: Members
    peers: Peers
    keys: VpnKeys
    refresh: Refresh  # brings the nodes to what an account may do now


@asynccontextmanager
async def open_services(config: Config) -> AsyncIterator[Services]:
    """Open the database at this version's schema, and what works on nothing else."""
    authority = await asyncio.to_thread(ca.load, config.ca_directory)
    secrets = await asyncio.to_thread(read_secrets, config.secret_key_file)
    pool = pool_of(config)
    settings = FleetSettings(
        channel_address=config.dialled_address(),
        ipv4_pool=pool.ipv4,
        ipv6_pool=pool.ipv6,
        wireguard_port=config.tunnel.port,
        mtu=config.tunnel.mtu,
        dns=config.tunnel.dns,
        pools=ProtocolPools(
            openvpn_ipv4=config.protocols.openvpn.ipv4_pool,
            openvpn_ipv6=config.protocols.openvpn.ipv6_pool,
            ssh_ipv4=config.protocols.ssh.ipv4_pool,
            l2tp_ipv4=config.protocols.l2tp.ipv4_pool,
        ),
        certificate_lifetime=timedelta(days=config.certificate_days),
    )
    async with AsyncExitStack() as stack:
        database = open_database(config.database_url, secrets)
        stack.push_async_callback(database.close)
        await migrate(database)
        keys = await load_keys(database)  # first of all: with other secrets than before nothing may be written
        passwords = Passwords(config.passwords)
        stack.callback(passwords.close)
        peers = Peers(pool)
        access = Access(passwords, peers.refresh, tunnels=most_tunnels(settings.pools.ssh_ipv4))
        changes = PasswordChanges(passwords, [access])
        accounts = Accounts(database, passwords, session_life=timedelta(hours=config.login_hours), changes=changes)
        administration = Administration(database, changes, [ending.end_account, access.end_account])

        async def refresh(tx: Transaction, user_id: str) -> None:
            await granting.rebalance(tx, user_id)
            await access.refresh(tx, user_id)

        members = Members(database, accounts, administration, access, Limits(refresh))
        fleet = Fleet(database, authority.pin, settings, [ending.forget_node, granting.forget_node])
        yield Services(
            database, authority, settings, fleet, passwords, accounts, administration, members, peers, keys, refresh
        )


async def stored_sessions(database: Database) -> Sessions:
    """The sessions as the running controller has stored them: to look at, and to end, beside it."""
    book = Book(0, new_id)
    async with database.connect() as connection:
        await Records(database).load(connection, book, time.time())
    return Sessions(database, book, ending.end_by_ids)


def pool_of(config: Config) -> Pool:
    return Pool.parse(config.tunnel.ipv4_pool, config.tunnel.ipv6_pool)
