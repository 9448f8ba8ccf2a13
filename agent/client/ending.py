"""Tunnels of this machine at their end: down here, and their connections ended on the controller."""

from __future__ import annotations

from collections.abc import Sequence

from agent.client import means, tunnel
from agent.client.api import Api
from agent.client.errors import NotLoggedIn, Refused
from agent.client.profile import LocalTunnel, Profile


async def take_down(found: Sequence[LocalTunnel]) -> None:
    """With all that was made for them; what is gone already is no error."""
    for item in found:
        if not item.is_proxy or item.netns is not None:
            tunnel.require_privilege()
        await means.of(item).down(item)


async def end(api: Api, profile: Profile, found: Sequence[LocalTunnel]) -> None:
    """End the connections of tunnels that are down. Whom the controller does not know (any more) has nothing to end
    there: then they are only forgotten, and NotLoggedIn is raised."""
    for item in found:
        try:
            await api.disconnect(item.connection_id)
        except NotLoggedIn:
            forget(profile, found)
            raise
        except Refused as error:
            if error.status != 404:  # it has ended before
                raise
        profile.forget_tunnel(item.connection_id)


def forget(profile: Profile, found: Sequence[LocalTunnel]) -> None:
    for item in found:
        profile.forget_tunnel(item.connection_id)
