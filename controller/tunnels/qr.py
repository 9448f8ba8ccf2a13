"""A client's configuration as a QR code for the camera of a phone."""

from __future__ import annotations

import asyncio
from io import BytesIO

import segno

_QUIET_ZONE = 4  # modules, ISO/IEC 18004 §6.3.8
_SCALE = 6


class TooMuchForQr(ValueError):
    """No QR code holds so much: 2,953 bytes at most (ISO/IEC 18004, version 40-L)."""


async def qr_svg(conf: str) -> bytes:
    """Raises TooMuchForQr."""
    return await asyncio.to_thread(_draw, conf, "svg")


async def qr_png(conf: str) -> bytes:
    """Raises TooMuchForQr."""
    return await asyncio.to_thread(_draw, conf, "png")


def _draw(conf: str, kind: str) -> bytes:
    out = BytesIO()
    # White is drawn, not left out: a transparent code cannot be read on a dark page.
    try:
        code = segno.make_qr(conf, error="l", encoding="utf-8", boost_error=False)
    except segno.DataOverflowError as error:
        raise TooMuchForQr(str(error)) from error
    code.save(out, kind=kind, border=_QUIET_ZONE, scale=_SCALE, dark="#000", light="#fff")
    return out.getvalue()
