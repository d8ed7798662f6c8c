"""Results: paired statistics, the heatmap and the curves, as data and as pictures."""
