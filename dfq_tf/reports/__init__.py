"""What is said of models and runs."""
