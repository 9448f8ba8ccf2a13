"""The service on each VPN host: makes the host run what the controller asked for, and reports."""
