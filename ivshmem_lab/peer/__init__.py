"""The Python process as a peer of a server."""
