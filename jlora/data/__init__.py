"""Data: files to conversations, conversations to tokens and loss masks, examples to batches."""
