"""Modules: WHAT is learned, and from which data (knows Lightning)."""
