"""The programs under comparison: one script each, run in a process of its own, reporting one line of JSON."""
