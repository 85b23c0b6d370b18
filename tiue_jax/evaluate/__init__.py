"""How good images are: features, metrics, protocols, and the report."""
