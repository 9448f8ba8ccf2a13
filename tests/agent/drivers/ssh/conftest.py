"""A node that serves SSH, and its neighbours."""

from __future__ import annotations

from tests.support.openssh import driver as driver
from tests.support.openssh import net as net
from tests.support.openssh import tun as tun
