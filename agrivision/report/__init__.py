"""A page about runs: curves, scores, tiles, and what they took."""
