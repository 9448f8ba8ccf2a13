"""OpenVPN 2.6 servers, one process for each transport, told what to do through their management sockets."""

from agent.drivers.openvpn.driver import OpenVpn as OpenVpn
from agent.drivers.openvpn.unit import Units as Units
