"""What a user name, an e-mail address and a password may be; pure."""

from __future__ import annotations

import re
import unicodedata

from email_validator import EmailNotValidError, validate_email

MIN_PASSWORD_CHARACTERS = 8
MAX_PASSWORD_BYTES = 1024

# Safe as a system user, a file name, an argument and a config value, whatever protocol uses it.
_USERNAME = re.compile(r"[a-z_][a-z0-9_-]{0,30}")

# Users that Debian and the VPN daemons own; an account of that name would be the machine's.
_SYSTEM_USERS = frozenset(
    """
    root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc gnats nobody _apt
    messagebus sshd postgres mysql redis systemd-network systemd-resolve systemd-timesync systemd-coredump
    systemd-journal polkitd avahi statd _rpc tcpdump uuidd tss libvirt-qemu libvirt-dbus dnsmasq unbound nginx ntp
    chrony openvpn wireguard strongswan xl2tpd skynetvpn skynetvpn-controller skynetvpn-agent
    """.split()  # noqa: SIM905
)

# The most guessed ones that are long enough for the length rule.
_COMMON_PASSWORDS = frozenset(
    """
    password password1 password12 password123 password1234 passw0rd p@ssw0rd p@ssword 12345678 123456789
    1234567890 0123456789 0987654321 987654321 87654321 11111111 00000000 88888888 12341234 12344321 123123123
    112233445566 qwertyui qwertyuiop qwerty12 qwerty123 qwerty1234 qwerty12345 1q2w3e4r 1q2w3e4r5t 1qaz2wsx
    1qazxsw2 zaq12wsx q1w2e3r4 asdfghjk asdfghjkl asdf1234 zxcvbnm1 zxcvbnm123 abcd1234 abc12345 abcdefgh abcdefg1
    a1b2c3d4 aa123456 aa12345678 iloveyou iloveyou1 ilovey0u sunshine sunshine1 princess princess1 football
    football1 baseball baseball1 basketball superman superman1 batman123 starwars startrek pokemon1 dragon123
    master123 monkey123 shadow123 michael1 jennifer computer internet samsung1 whatever trustno1 letmein1
    letmein123 welcome1 welcome12 welcome123 changeme changeme1 changeme123 default1 admin123 admin1234 admin12345
    administrator root1234 toor1234 test1234 test12345 testtest guest123 user1234 secret12 secret123 mypassword
    yourpassword security access14 corvette mercedes maverick midnight mountain victoria charlie1 jordan23
    liverpool chelsea1 arsenal1 alexander danielle samantha nicholas qazwsxedc 147258369 789456123 159753456
    741852963 skynetvpn skynet123 vpn12345
    """.split()  # noqa: SIM905
)


def check_username(text: str) -> str | None:
    """What is wrong with a new user name, or None."""
    if not _USERNAME.fullmatch(text):
        return "use 1 to 31 lower-case letters, digits, _ or -, not starting with a digit or -"
    if text in _SYSTEM_USERS or text.startswith("systemd-"):
        return "is reserved"
    return None


def check_password(text: str, *own: str) -> str | None:
    """What is wrong with a new password, or None; `own` are the account's names, which are guessed first."""
    if len(text) < MIN_PASSWORD_CHARACTERS:
        return f"use at least {MIN_PASSWORD_CHARACTERS} characters"
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        return "has control characters"
    if len(text.encode()) > MAX_PASSWORD_BYTES:
        return f"use at most {MAX_PASSWORD_BYTES} bytes"
    if text.casefold() in _COMMON_PASSWORDS or len(set(text)) == 1:
        return "is among the first that are guessed"
    if text.casefold() in {name.casefold() for name in own}:
        return "is the name of the account"
    return None


def parse_email(text: str) -> str:
    """The address as it is written to; raise ValueError with the reason."""
    try:
        return validate_email(text, check_deliverability=False, strict=True).normalized
    except EmailNotValidError as error:
        raise ValueError("is not an e-mail address") from error


def fold(identifier: str) -> str:
    """The form in which user names and e-mail addresses are compared."""
    return unicodedata.normalize("NFC", identifier).casefold()
