"""The node-facing side: enrolment, the WebSocket endpoint, sessions, the hub."""
