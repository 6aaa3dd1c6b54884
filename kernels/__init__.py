"""The mathematics: one operation per file, each with a plain-torch reference."""
