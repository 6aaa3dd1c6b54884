"""Mixtures of experts: which experts stay near the processor, and who computes the others. Policy only, no tensors."""
