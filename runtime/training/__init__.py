"""What fine-tuning needs beyond a model: its data."""
