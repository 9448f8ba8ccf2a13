"""Desired state: rows per scope, and what a node has to be sent."""
