"""The Bellman sweep: `backward` makes the feedback policy, `forward` rolls it out."""
