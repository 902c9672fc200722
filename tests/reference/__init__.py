"""Slow and obvious re-derivations that the package is compared with."""
