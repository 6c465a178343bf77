"""Text in: corpora, tokenizers, token shards and the order in which training sees them."""
