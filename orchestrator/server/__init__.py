"""The process slot and the server in it; the only folder that imports `psutil`."""
