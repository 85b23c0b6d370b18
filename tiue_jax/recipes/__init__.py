"""Recipes: a file of one `get_config()` each, which `tiue train --config NAME` finds by name. They list what differs
from the defaults in training/settings.py."""
