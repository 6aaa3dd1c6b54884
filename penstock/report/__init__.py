"""The HTML report of a profile: one file that needs no network."""
