"""Connections, addresses, client configs, sessions."""
