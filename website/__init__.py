"""Makes the documentation site of docs/: the generated pages, the figures, and the explanations of errors."""
