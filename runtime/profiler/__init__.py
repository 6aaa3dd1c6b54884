"""Where memory and time go: recording, the file, and what can be computed from it. Readers need no torch."""
