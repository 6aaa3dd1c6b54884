"""Device backends: one protocol, three implementations."""
