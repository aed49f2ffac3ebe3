"""`llama-orchestrator demo`: everything on a tiny model that it makes itself."""
