"""The verbs of `penstock moe …`."""
