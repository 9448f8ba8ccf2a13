"""The public API: kit.py, and one package per documented contract."""
