"""Everything that touches the host: a port in base.py, and its implementations."""
