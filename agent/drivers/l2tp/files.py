"""The files that xl2tpd, pppd, charon and nft read; pure.

xl2tpd and its pppds see our directory as their /etc/ppp (privately.py), so the paths in these files are fixed, the
machine's own PPP settings do not apply to our sessions, and its chap-secrets lets nobody in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, ip_address
from pathlib import Path

from shared.services import L2TP_PORT, L2tpServer

ETC_PPP = Path("/etc/ppp")
SESSIONS = "sessions"  # the folder of the records that the hooks write
TABLE = "inet skynetvpn_l2tp"
_SERVER_NAME = "skynetvpn"  # ours in CHAP; no client is asked for it
_DNS_SERVERS = 2  # as many as IPCP can say
_SECRETS_LINE = re.compile(r'"([^"\\]+)" skynetvpn "((?:[^"\\]|\\["\\])*)" \*')
_START_TICKS = "read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ start _ < /proc/$PPPD_PID/stat"


def xl2tpd_conf(spec: L2tpServer) -> str:
    """xl2tpd.conf(5). Client and server addresses are the pool's, the server has the first."""
    pool = IPv4Network(spec.ipv4_pool)
    return f"""\
[global]
port = {L2TP_PORT}
auth file = /dev/null
[lns default]
ip range = {pool[2]}-{pool[-2]}
local ip = {pool[1]}
require authentication = yes
length bit = yes
pass peer = yes
pppoptfile = {ETC_PPP}/options.l2tp
"""


def ppp_options(spec: L2tpServer) -> str:
    """pppd(8). The refusals are about us: a server never proves itself to a client by a client's secret."""
    dns = [server for server in spec.dns if ip_address(server).version == 4][:_DNS_SERVERS]
    lines = [
        f"name {_SERVER_NAME}",
        "auth",
        "require-mschap-v2",
        *(f"refuse-{method}" for method in ("pap", "chap", "mschap", "mschap-v2", "eap")),
        f"mtu {spec.mtu}",
        f"mru {spec.mtu}",
        *(f"ms-dns {server}" for server in dns),
        "lcp-echo-interval 20",
        "lcp-echo-failure 3",
        "lcp-echo-adaptive",
        "noipv6",
        "noccp",
        "novj",
        "nomp",
        "nodefaultroute",
        "noproxyarp",
        "nologfd",
        "hide-password",
    ]
    return "".join(f"{line}\n" for line in lines)


def hooks() -> dict[str, str]:
    """The two programs that pppd starts for a session, by file name; they use the shell's own commands only.

    pppd waits for ip-pre-up: the session is on record before its first packet passes, also while no agent runs. ip-down
    notes the final counters; pppd's own ones, its last resort, have 32 bits.
    """
    begin = f"""\
#!/bin/sh
{_START_TICKS}
record={ETC_PPP}/{SESSIONS}/$PPPD_PID-$start
"""
    return {
        "ip-pre-up": f"""\
{begin}read -r boot < /proc/sys/kernel/random/boot_id
[ -e "$record" ] || printf '%s\\n' "$boot" "$PEERNAME" "$IFNAME" "$IPREMOTE" "$6" end > "$record"
""",
        "ip-down": f"""\
{begin}final="$BYTES_RCVD $BYTES_SENT"
while read -r name rx _ _ _ _ _ _ _ tx _; do
    [ "$name" = "$IFNAME:" ] && final="$rx $tx"
done < /proc/net/dev
printf '%s\\n' "$final" end > "$record.final"
""",
    }


def chap_secrets(secrets: Mapping[str, str]) -> str:
    """pppd's secrets file, passwords by user name. Both are printable ASCII, as `Credential.check` has it."""
    lines = (f'"{name}" {_SERVER_NAME} {_quoted(secrets[name])} *\n' for name in sorted(secrets))
    return f"# SkynetVPN writes this file.\n{''.join(lines)}"


def read_chap_secrets(text: str) -> dict[str, str]:
    """The passwords by user name of the lines that are exactly as we write them."""
    found = (_SECRETS_LINE.fullmatch(line) for line in text.splitlines())
    return {match[1]: re.sub(r"\\(.)", r"\1", match[2]) for match in found if match}


def refusal(secret: str) -> str | None:
    """Why pppd cannot have this password, or None."""
    if secret.startswith("@/"):
        return "an L2TP password cannot begin with @/: pppd takes it for the name of a file"
    return None


def strongswan_conf(socket: Path) -> str:
    """strongswan.conf(5): only the plugins that IKEv1 with a pre-shared key needs."""
    return f"""\
charon-systemd {{
    load_modular = no
    load = random nonce openssl kernel-netlink socket-default vici
    threads = 8
    plugins {{
        vici {{
            socket = "unix://{socket}"
        }}
    }}
}}
"""


def ruleset() -> str:
    """nft(8): L2TP passes under IPsec only, in both directions, also while charon is away."""
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
	chain input {{
		type filter hook input priority filter; policy accept;
		udp dport {L2TP_PORT} meta ipsec missing drop
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		udp sport {L2TP_PORT} rt ipsec missing drop
	}}
}}
"""


def connection() -> dict[str, object]:
    """The `load-conn` request of vici: IKEv1, any client that knows the key, transport mode, UDP port 1701 only.

    Rekeying is left to the clients: they are behind NATs, and know when they are there.
    """
    return {
        "l2tp": {
            "version": "1",
            "proposals": _IKE,
            # Clients name themselves by their private addresses: two of them may well be the same.
            "unique": "never",
            "rekey_time": "0s",
            "reauth_time": "0s",
            "dpd_delay": "30s",
            "dpd_timeout": "120s",
            "local": {"auth": "psk"},
            "remote": {"auth": "psk"},
            "children": {
                "l2tp": {
                    "mode": "transport",
                    # UDP by its number: where netbase is not installed no file knows the name.
                    "local_ts": [f"dynamic[17/{L2TP_PORT}]"],
                    "remote_ts": ["dynamic[17]"],
                    "esp_proposals": _ESP,
                    "rekey_time": "0s",
                    "dpd_action": "clear",
                }
            },
        }
    }


def shared_key(psk: str) -> dict[str, object]:
    """The `load-shared` request: one key for all clients."""
    return {"id": "l2tp", "type": "ike", "data": psk}


# Modern first. The clients that systems bring along: macOS and iOS take SHA-256 with modp2048, Windows only SHA-1, with
# ecp384 or modp2048. What is left out (3DES, MD5, modp1024) is all that Android before 12 can do.
_IKE: Sequence[str] = (
    "aes256-sha384-ecp384",
    "aes256-sha256-ecp256",
    "aes256-sha256-modp2048",
    "aes256-sha1-ecp384",
    "aes256-sha1-modp2048",
)
_ESP: Sequence[str] = ("aes256gcm16", "aes256-sha256", "aes256-sha1")


def _quoted(secret: str) -> str:
    escaped = secret.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'
