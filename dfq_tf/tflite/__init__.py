"""The TFLite file: writing, running and checking it."""
