"""The networks and what they minimise."""
