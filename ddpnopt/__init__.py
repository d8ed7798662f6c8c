"""DDPNOpt: differential dynamic programming for training neural networks (Liu, Chen, Theodorou, ICLR 2021).

The configuration (`ddpnopt.config`), the dataset catalogue (`ddpnopt.datasets.catalog`) and the results
(`ddpnopt.results`) import without torch, so that a service can speak of runs without being able to
train them. Everything else needs torch; nothing here knows of Ray, SQL or HTTP.
"""

NUMERICS_VERSION = 1
"""Raised whenever a change alters the bits of any run's result; stored with every result."""
