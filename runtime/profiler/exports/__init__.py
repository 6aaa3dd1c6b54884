"""A profile for the tools of others: one format per file, registered in `formats`."""
