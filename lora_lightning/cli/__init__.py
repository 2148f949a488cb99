"""The command line: Hydra is known here and nowhere below."""
