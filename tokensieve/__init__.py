"""tokensieve."""
