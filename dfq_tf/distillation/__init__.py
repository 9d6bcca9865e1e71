"""Generators against students: the data-free training."""
