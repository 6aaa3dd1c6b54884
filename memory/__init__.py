"""Where bytes live: arenas, checkpoint extents, disk engine, capacity, ledger. Imports nothing of ours."""
