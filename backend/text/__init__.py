"""Text to token ids, chat to token ids, token ids to text: what preprocessing and postprocessing call."""
