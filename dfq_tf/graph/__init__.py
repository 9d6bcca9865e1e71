"""The representation of a network, the rewrites of it, and what a classifier is."""
