"""Keys and values in tiers: which blocks a sequence is made of, where each lies, and who attends to it. No tensors."""
