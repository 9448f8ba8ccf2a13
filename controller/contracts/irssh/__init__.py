"""The contract `irssh`: the panel's bare JSON under /api, errors as {detail}."""

from controller.contracts.irssh.routes import contract

__all__ = ["contract"]
