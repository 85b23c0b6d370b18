"""Training recipes: one get_config() each, launched as its docstring says."""
