"""Samplers: their registry, their settings, and the one compiled function from token ids to images."""
