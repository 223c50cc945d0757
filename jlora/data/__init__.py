"""Training data: files to conversations, conversations to token ids and loss masks, examples to batches."""
