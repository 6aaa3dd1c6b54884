"""Measuring a machine: one probe per file, and what runs them all."""
