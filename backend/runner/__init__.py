"""What executes a step."""
