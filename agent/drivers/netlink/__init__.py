"""Netlink as far as a VPN host needs it: no library, so that the agent stays small in memory."""
