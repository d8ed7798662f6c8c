"""Teams: whose sweeps, with what share of the devices and which quotas."""
