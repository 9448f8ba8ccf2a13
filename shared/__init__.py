"""What the controller and the agent must agree on: pure values and rules, no I/O."""

__version__ = "0.1.0"
