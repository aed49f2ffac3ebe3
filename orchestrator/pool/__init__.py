"""Several models by name on one machine."""
