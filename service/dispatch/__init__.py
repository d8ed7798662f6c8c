"""Scheduling: states, leases, policy, the loop, and the process that wires in Ray."""
