"""The text of the agent's nftables table (nft(8)); pure.

Clients are the addresses of the tunnels' own networks. The table drops what must not pass and accepts nothing on behalf
of others: the policy is accept, and a rule of the host's own tables may still drop. Clients of WireGuard come by an
interface with a known name; those of the other servers by devices that come and go, so that only their pool is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_interface, ip_network

from agent.drivers.base import Tunnels
from shared.addresses import Network
from shared.desired import Interface

TABLE = "inet skynetvpn"
_INSIDE = "from-"  # begins the name of the chain for what comes out of an interface


def render(interfaces: Sequence[Interface], tunnels: Sequence[Tunnels] = ()) -> str:
    """One transaction that replaces our whole table; without clients it only takes the table away."""
    # Deleting a table that is not there is an error, declaring one that is there is not.
    replace = f"table {TABLE}\ndelete table {TABLE}\n"
    if not interfaces and not tunnels:
        return replace
    for interface in interfaces:
        interface.check()  # so that nothing in a name or an address can end a quoted string or a rule
    ordered = sorted(interfaces, key=lambda interface: interface.name)
    pools = sorted(tunnels, key=lambda each: each.name)
    names = [interface.name for interface in ordered]
    clients = _by_keyword(
        [network for interface in ordered for network in _own(interface)] + [n for each in pools for n in _pool(each)]
    )
    chains = (
        *(_inside(each) for each in ordered),
        _chain(
            "prerouting",
            "filter hook prerouting priority raw",
            [_diverted(names), *map(_spoofing, ordered), *map(_pool_spoofing, pools)],
        ),
        _chain(
            "forward",
            "filter hook forward priority filter",
            [*(_forward(each, names) for each in ordered), *(_pool_forward(each, clients) for each in pools)],
        ),
        _chain(
            "postrouting",
            "nat hook postrouting priority srcnat",
            [*(_nat(each, names) for each in ordered), *(_pool_nat(each, clients) for each in pools)],
        ),
    )
    return f"{replace}table {TABLE} {{\n{''.join(chains)}}}\n"


def _chain(name: str, hook: str, rules: Iterable[Iterable[str]]) -> str:
    # Once each: isolating the only interface says the same in both directions.
    lines = "".join(dict.fromkeys(f"\t\t{rule}\n" for group in rules for rule in group))
    return f"\tchain {name} {{\n\t\ttype {hook}; policy accept;\n{lines}\t}}\n"


def _diverted(names: Sequence[str]) -> Iterator[str]:
    """What comes out of a tunnel meets no rule for the others: each rule costs every packet of all clients."""
    for name in names:
        yield f'iifname "{name}" goto {_INSIDE}{name}'


def _inside(interface: Interface) -> str:
    """A client's address comes out of the tunnel, and nothing else does."""
    own = _networks(interface)
    rules = "".join(f"\t\t{keyword} saddr {networks} accept\n" for keyword, networks in own.items())
    return f"\tchain {_INSIDE}{interface.name} {{\n{rules}\t\tdrop\n\t}}\n"


def _spoofing(interface: Interface) -> Iterator[str]:
    """It comes from nowhere else; the address is asked first, which most packets of the host have not."""
    for keyword, networks in _networks(interface).items():
        yield f'{keyword} saddr {networks} iifname != "lo" drop'


def _only_own(device: str, own: dict[str, str]) -> Iterator[str]:
    for keyword, protocol in (("ip", "ipv4"), ("ip6", "ipv6")):
        yield (
            f"{device} {keyword} saddr != {own[keyword]} drop"
            if keyword in own
            else f"{device} meta nfproto {protocol} drop"
        )


def _forward(interface: Interface, tunnels: Sequence[str]) -> Iterator[str]:
    name = f'"{interface.name}"'
    if interface.isolate:
        yield f"iifname {name} oifname {_set(tunnels)} drop"
        yield f"iifname {_set(tunnels)} oifname {name} drop"
    # The tunnel's MTU is below that of most paths, and the ICMP messages that would say so are often filtered.
    for direction in ("iifname", "oifname"):
        yield f"{direction} {name} tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
    if interface.masquerade:
        # Behind NAT a client is reached by answers only; a neighbour could else address it by its inner address.
        yield f"iifname != {_set(tunnels)} oifname {name} ct state != {{ established, related }} drop"


def _nat(interface: Interface, tunnels: Sequence[str]) -> Iterator[str]:
    if interface.masquerade:
        for keyword, networks in _networks(interface).items():
            yield f"{keyword} saddr {networks} oifname != {_set(['lo', *tunnels])} masquerade"


def _pool_spoofing(tunnels: Tunnels) -> Iterator[str]:
    """An address of the pool comes from where packets to it would go, and from nowhere else."""
    own = _by_keyword(_pool(tunnels))
    if tunnels.devices:
        yield from _only_own(f'iifname "{tunnels.devices}*"', own)
    for keyword, networks in own.items():
        yield f'{keyword} saddr {networks} iifname != "lo" fib saddr . iif oif missing drop'


def _pool_forward(tunnels: Tunnels, clients: dict[str, str]) -> Iterator[str]:
    for keyword, networks in _by_keyword(_pool(tunnels)).items():
        if tunnels.isolate:
            yield f"{keyword} saddr {networks} {keyword} daddr {clients[keyword]} drop"
            yield f"{keyword} saddr {clients[keyword]} {keyword} daddr {networks} drop"
        for direction in ("saddr", "daddr"):
            yield (f"{keyword} {direction} {networks} tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu")
        if tunnels.masquerade:
            yield (
                f"{keyword} daddr {networks} {keyword} saddr != {clients[keyword]} "
                "ct state != { established, related } drop"
            )


def _pool_nat(tunnels: Tunnels, clients: dict[str, str]) -> Iterator[str]:
    if tunnels.masquerade:
        for keyword, networks in _by_keyword(_pool(tunnels)).items():
            yield f'{keyword} saddr {networks} {keyword} daddr != {clients[keyword]} oifname != "lo" masquerade'


def _networks(interface: Interface) -> dict[str, str]:
    return _by_keyword(_own(interface))


def _own(interface: Interface) -> list[Network]:
    return [ip_interface(address).network for address in interface.addresses]


def _pool(tunnels: Tunnels) -> list[Network]:
    return [ip_network(text) for text in tunnels.networks]


def _by_keyword(networks: Sequence[Network]) -> dict[str, str]:
    """The prefixes as nft sets, by the keyword of their IP version; a version without any has no entry."""
    by_keyword: dict[str, list[Network]] = {
        "ip": [*collapse_addresses(network for network in networks if isinstance(network, IPv4Network))],
        "ip6": [*collapse_addresses(network for network in networks if isinstance(network, IPv6Network))],
    }
    return {keyword: f"{{ {', '.join(map(str, found))} }}" for keyword, found in by_keyword.items() if found}


def _set(names: Iterable[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"{{ {', '.join(quoted)} }}"
