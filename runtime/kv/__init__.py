"""Keys and values in tiers: the cache that a model is given, and the attention that it computes with."""
