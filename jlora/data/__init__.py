"""From files to batches: conversations, tokens and masks, rows without padding."""
