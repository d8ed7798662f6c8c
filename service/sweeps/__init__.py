"""Sweeps: the spec and its expansion, submission, listing and state."""
