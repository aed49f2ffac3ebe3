"""The owner of a slot, its effects, and the public facades."""
