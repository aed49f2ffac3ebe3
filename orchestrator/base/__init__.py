"""What every room may use: logs, tokens, small files, threads. Standard library and structlog."""
