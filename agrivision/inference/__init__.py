"""Trained runs at work: tiles and scenes → class ids and maps."""
