"""The other sides that are programs of ours: as their own documentation teaches, made as fast as that allows."""
