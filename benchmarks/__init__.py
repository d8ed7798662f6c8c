"""What the figures in `docs/performance.md` come from. Each runs both sides in one go."""
