"""Callbacks: WHEN something happens during a run."""
