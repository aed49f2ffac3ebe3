"""What may be asked for: requests, flags, identity. Pure."""
