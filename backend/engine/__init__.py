"""In-flight batching: scheduler, loop, process."""
