"""Measures the product against named programs, both sides in one run."""
