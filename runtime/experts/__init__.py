"""Experts of a mixture as blocks of their own: found, given slots, and computed as transformers computes them."""
