"""The cluster as people see it: nodes, what runs where and for whom."""
