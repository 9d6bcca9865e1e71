"""From what a user has, a file or a model, to a classifier."""
