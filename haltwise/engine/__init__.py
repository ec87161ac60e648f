"""What a language model in torch needs to be halted: its cache, its tokens, its signals."""
