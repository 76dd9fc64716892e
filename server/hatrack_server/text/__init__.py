"""Text to tokens and back, without torch; the trainer uses the same code, so that it tokenises alike."""
