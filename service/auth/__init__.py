"""Who asks, and what they may: roles now, identity and tokens to come."""
