"""WireGuard interfaces: in the kernel, or in a program of their own where the kernel has none."""
