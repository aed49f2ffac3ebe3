"""Several models on one machine, by name: their catalogue, memory and machine."""
