"""Layers as dynamics x_{t+1} = σ_t(g(x_t, u_t)): forward passes, pull-backs and losses over a pack."""
