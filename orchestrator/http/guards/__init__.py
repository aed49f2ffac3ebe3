"""What a request has to pass before a route sees it: keys, limits, origins."""
