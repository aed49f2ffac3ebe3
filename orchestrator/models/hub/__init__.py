"""Models on the Hub and in its cache; `huggingface_hub` in fetcher.py only."""
