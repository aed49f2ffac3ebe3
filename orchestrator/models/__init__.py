"""Where models come from: this machine, or the Hub."""
