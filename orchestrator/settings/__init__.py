"""Load requests, llama-server flags, and when two loads are the same. Pure."""
