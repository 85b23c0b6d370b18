"""The recipes of tiue_jax/recipes, by their familiar paths."""
