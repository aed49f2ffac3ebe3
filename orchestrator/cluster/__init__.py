"""Several machines: a pool on each, placed and restarted by Ray Serve, behind fronts that route."""
