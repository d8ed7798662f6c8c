"""The paper's figures and tables as sweeps of this service, and how they compare with what was published."""
