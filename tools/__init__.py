"""The command-line tools; each is also a module that tests import."""
