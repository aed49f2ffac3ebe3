"""`llama-orchestrator demo`: the main features, shown on tiny models that it makes itself."""
