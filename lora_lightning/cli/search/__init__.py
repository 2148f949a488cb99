"""Searches: sweepers that choose what to try next from what has come out."""
