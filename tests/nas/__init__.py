"""Tests of the package `nas`."""
