"""The dashboard: pages rendered here, refreshed by one small script, heatmaps by plotly."""
