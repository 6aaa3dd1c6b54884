"""Measurements of penstock and of its peers. Run from a checkout; not part of the installed package."""
