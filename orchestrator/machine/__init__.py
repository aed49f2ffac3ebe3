"""The state machine: facts in, commands out. Pure; `transitions` in step.py only."""
