"""Models on the Hub and in its cache; `huggingface_hub` in the fetcher's process only."""
