"""What has been asked below `/v1`: the last requests, and tokens, requests and memory over time."""
