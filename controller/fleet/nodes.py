"""What a node is to the controller, and what an administrator may say about one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address

from controller.accounts.principal import Plan
from controller.errors import InvalidInput
from shared.desired import INTERFACE_NAME, Protocol

INTERFACE = "sky0"  # of nodes that are given no other
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_MAX_CITY = 64

# ISO 3166-1 alpha-2
COUNTRIES = frozenset(
    """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ
    CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR
    GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO
    JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR
    MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO
    RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV
    TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW
    """.split()  # noqa: SIM905 - a list of 249 literals would fill a page
)


class NodeStatus(StrEnum):
    ENABLED = "enabled"
    MAINTENANCE = "maintenance"  # keeps serving, takes no new connections
    DISABLED = "disabled"  # cut off from the controller
    LOCKED = "locked"  # two hosts used its identity: cut off, its tunnels stay

    @property
    def admitted(self) -> bool:
        return self in (NodeStatus.ENABLED, NodeStatus.MAINTENANCE)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What an administrator says about a node."""

    name: str
    country: str
    city: str
    endpoint: str | None = None  # host that clients dial; None = as it is, for a new node the address it connects from
    plan: Plan | None = None  # None = as it is, for a new node free
    interface: str | None = None  # None = as it is, for a new node INTERFACE
    port: int | None = None  # None = as it is, for a new node that of the settings
    protocols: tuple[Protocol, ...] | None = None  # that it may offer; None = as it is, for a new node all

    def check(self) -> None:
        """Raise InvalidInput with every field that cannot be used."""
        problems: dict[str, str] = {}
        if not _NAME.fullmatch(self.name):
            problems["name"] = "use 1 to 63 letters, digits, spaces or . _ - and begin and end with a letter or digit"
        if self.country not in COUNTRIES:
            problems["country"] = "use a two-letter ISO 3166-1 code in capitals, such as US"
        if not 1 <= len(self.city) <= _MAX_CITY or not self.city.isprintable() or self.city != self.city.strip():
            problems["city"] = f"use 1 to {_MAX_CITY} printable characters"
        if self.endpoint is not None and not is_host(self.endpoint):
            problems["endpoint"] = "use a host name or an IP address, without a port"
        if self.interface is not None and not INTERFACE_NAME.fullmatch(self.interface):
            problems["interface"] = "use 1 to 15 of A-Z a-z 0-9 _ -"
        if self.port is not None and not 1 <= self.port <= 65535:
            problems["port"] = "use 1 to 65535"
        if problems:
            raise InvalidInput(problems)


def is_host(text: str) -> bool:
    """Whether clients could dial it: a host name (RFC 1123), or an address without a zone."""
    try:
        address = ip_address(text)
    except ValueError:
        labels = text.removesuffix(".").split(".")
        return len(text) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return "%" not in text and not address.is_unspecified and not address.is_multicast


def printable(text: str) -> str:
    """A node's words without control and direction characters, fit for a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
