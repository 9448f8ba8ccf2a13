from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.netns import Namespace


@pytest.mark.netns
def test_nothing_of_a_namespace_is_left() -> None:
    with Namespace("left") as place:
        files = Path("/etc/netns", place.name)
        files.mkdir(parents=True)
        (files / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    assert not files.exists()
    assert not place.path.exists()
