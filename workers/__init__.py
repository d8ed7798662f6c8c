"""What runs on the cluster. `protocol` is the only part that the service sees."""
