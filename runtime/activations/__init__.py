"""What autograd saves for backward: where each storage is meanwhile, and how it comes back."""
