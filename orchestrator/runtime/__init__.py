"""The owner, what it carries out, and the facades that callers use."""
