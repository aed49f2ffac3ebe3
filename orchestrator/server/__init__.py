"""The process slot and the server in it; `psutil` here only."""
