"""Every page that we make, opened in a real browser."""
