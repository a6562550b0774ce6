"""The network and its processor. Flat, single-dot imports only, so that it can be exported as custom code."""
