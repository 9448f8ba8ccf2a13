"""A client's configuration as a QR code for the camera of a phone."""

from __future__ import annotations

import asyncio
from io import BytesIO

import segno

_QUIET_ZONE = 4  # modules, ISO/IEC 18004 §6.3.8
_SCALE = 6


async def qr_svg(conf: str) -> bytes:
    return await asyncio.to_thread(_draw, conf, "svg")


async def qr_png(conf: str) -> bytes:
    return await asyncio.to_thread(_draw, conf, "png")


def _draw(conf: str, kind: str) -> bytes:
    out = BytesIO()
    # White is drawn, not left out: a transparent code cannot be read on a dark page.
    code = segno.make_qr(conf, error="l", encoding="utf-8", boost_error=False)
    code.save(out, kind=kind, border=_QUIET_ZONE, scale=_SCALE, dark="#000", light="#fff")
    return out.getvalue()
