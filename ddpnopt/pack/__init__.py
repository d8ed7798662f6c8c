"""Packs: runs that train together as one tensor program, stacked on a leading dimension R."""
