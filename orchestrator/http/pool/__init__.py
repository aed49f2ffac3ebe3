"""The HTTP surface of a pool: routes for all of its models, and `/v1` by name."""
