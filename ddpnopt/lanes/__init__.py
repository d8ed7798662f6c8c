"""Lanes: a fast path for small fully connected nets, many steps of a block of runs in one native call."""
