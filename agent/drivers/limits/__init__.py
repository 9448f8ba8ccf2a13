"""Speed limits and byte allowances of accounts, enforced by the kernel."""

from agent.drivers.limits.driver import KernelLimits

__all__ = ["KernelLimits"]
