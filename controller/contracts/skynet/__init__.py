"""The contract `skynet`: bare JSON under /api, errors as {error, code}."""

from controller.contracts.skynet.routes import contract

__all__ = ["contract"]
