"""Data: the tokenizer, preparing text into shards, and reading shards in batches."""
