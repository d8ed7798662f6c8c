"""Specs to start from, and the demo."""
