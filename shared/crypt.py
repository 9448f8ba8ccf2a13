"""Password hashes as crypt(5) has them: what /etc/shadow holds and sshd checks. Through the C library's own libcrypt.

Every Debian has it (libcrypt1). A call takes tens of milliseconds of one core: never call it on an event loop.
"""

from __future__ import annotations

import ctypes
import functools
import hmac

_DATA_BYTES = 32768  # struct crypt_data of libxcrypt, crypt(3)
_SETTING_BYTES = 192  # CRYPT_GENSALT_OUTPUT_SIZE
MAX_PASSWORD_BYTES = 255
PREFIX = "$y$"  # yescrypt
LEAST_COST = 1  # a few milliseconds; enough for a password of 128 random bits, which nobody guesses at any speed


class CryptUnavailable(RuntimeError):
    """This machine's libcrypt cannot do it."""


def hash_password(password: str, cost: int = 0) -> str:
    """A new yescrypt hash, with a salt of the system's random source; raise CryptUnavailable, or ValueError for a
    password that no login could send (NUL, newline, more than 255 bytes). `cost` is 1 to 11, 0 = what the library
    advises."""
    setting = ctypes.create_string_buffer(_SETTING_BYTES)
    if not _library().crypt_gensalt_rn(PREFIX.encode(), cost, None, 0, setting, _SETTING_BYTES):
        raise CryptUnavailable("libcrypt makes no yescrypt salt")
    return _crypt(_encoded(password), setting.value)


def verify_password(password: str, hashed: str) -> bool:
    """Whether the password has this hash, of any form that libcrypt knows; a broken hash fits nothing."""
    try:
        computed = _crypt(_encoded(password), hashed.encode())
    except (CryptUnavailable, ValueError):
        return False
    return hmac.compare_digest(computed.encode(), hashed.encode())


def _encoded(password: str) -> bytes:
    raw = password.encode()
    if len(raw) > MAX_PASSWORD_BYTES or any(character in raw for character in b"\0\r\n"):
        raise ValueError(f"a password has at most {MAX_PASSWORD_BYTES} bytes, and no line break or NUL")
    return raw


def _crypt(password: bytes, setting: bytes) -> str:
    data = ctypes.create_string_buffer(_DATA_BYTES)
    found: bytes | None = _library().crypt_rn(password, setting, data, _DATA_BYTES)
    if found is None or found.startswith(b"*"):
        raise CryptUnavailable("libcrypt does not know this form of hash")
    return found.decode("ascii")


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcrypt.so.1")
    except OSError as error:
        raise CryptUnavailable("libcrypt.so.1 (Debian package libcrypt1) is not on this machine") from error
    library.crypt_rn.restype = ctypes.c_char_p
    library.crypt_rn.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    library.crypt_gensalt_rn.restype = ctypes.c_char_p
    library.crypt_gensalt_rn.argtypes = [
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
    ]
    return library
