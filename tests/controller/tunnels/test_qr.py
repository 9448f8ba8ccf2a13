"""QR codes of configurations."""

from __future__ import annotations

import struct
import zlib
from xml.etree import ElementTree

import segno

from controller.tunnels.qr import qr_png, qr_svg

CONF = "[Interface]\nPrivateKey = " + "A" * 43 + "=\n" + "# filling\n" * 30
QUIET_ZONE = 4


def rows_of(png: bytes) -> tuple[int, list[bytes]]:
    """The width in pixels and the unfiltered rows of a one-bit greyscale or palette image."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth = struct.unpack(">IIB", png[16:25])
    assert depth == 1
    data, position = b"", 8
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        if png[position + 4 : position + 8] == b"IDAT":
            data += png[position + 8 : position + 8 + length]
        position += 12 + length
    raw, stride = zlib.decompress(data), 1 + (width + 7) // 8
    rows: list[bytes] = []
    for start in range(0, height * stride, stride):
        filtering, row = raw[start], raw[start + 1 : start + stride]
        assert filtering in (0, 2)  # none, or the difference to the row above (PNG, section 9.2)
        above = rows[-1] if filtering == 2 else bytes(len(row))
        rows.append(bytes((value + up) % 256 for value, up in zip(row, above, strict=True)))
    return width, rows


async def test_the_png_holds_the_code_of_the_text_in_a_quiet_zone() -> None:
    expected = segno.make_qr(CONF, error="l", encoding="utf-8", boost_error=False)
    modules = [list(row) for row in expected.matrix_iter(scale=1, border=QUIET_ZONE)]
    width, rows = rows_of(await qr_png(CONF))
    scale = width // len(modules)
    assert width == scale * len(modules) == len(rows)
    bits = [
        [rows[y * scale][x * scale // 8] >> (7 - x * scale % 8) & 1 for x in range(len(modules))]
        for y in range(len(modules))
    ]
    light = bits[0][0]
    assert [[bit != light for bit in row] for row in bits] == [[bool(module) for module in row] for row in modules]
    assert all(bit == light for row in bits[:QUIET_ZONE] for bit in row)


async def test_the_svg_is_one_picture_with_a_drawn_background() -> None:
    root = ElementTree.fromstring(await qr_svg(CONF))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    paths = root.iter("{http://www.w3.org/2000/svg}path")
    assert [path.get("fill") or path.get("stroke") for path in paths] == ["#fff", "#000"]
