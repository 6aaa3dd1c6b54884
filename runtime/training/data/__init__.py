"""From a file of texts, prompts and responses or conversations to batches of token ids.

Rows are tokenized once into a file that is mapped afterwards; packing, shuffling and batching only compute indices.
"""
