"""Whether an artifact says what the model says, and how far the two are apart."""
