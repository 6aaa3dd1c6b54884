"""What `penstock demo` runs: a small checkpoint, contestants in processes of their own, and the table of results."""
