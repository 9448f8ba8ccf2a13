"""Nodes, join tokens, node certificates, the directory of servers."""
