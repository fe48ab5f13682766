"""The container's entrypoint."""
