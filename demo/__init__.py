"""A page to talk to a checkpoint: type, show pictures, speak."""
