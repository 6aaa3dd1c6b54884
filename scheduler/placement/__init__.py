"""Which blocks live where, and which processor computes them."""
