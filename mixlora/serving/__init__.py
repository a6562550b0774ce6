"""One model for many users: a batch that requests join and leave, and the server on top of it."""
