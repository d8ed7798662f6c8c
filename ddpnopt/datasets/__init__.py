"""Datasets: `catalog` says what there is (no torch, no scikit-learn), `load` reads it."""
