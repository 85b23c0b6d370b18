"""The names of files and folders in a pipeline folder, as diffusers lays it out. Each name is defined once, here."""

from tiue_jax.models import tokenizer

MODEL_PARTS = ("unet", "vae", "text_encoder")  # folders with a config.json and weights
PARTS = (*MODEL_PARTS, "tokenizer", "scheduler")

MODEL_INDEX = "model_index.json"  # identifies a pipeline folder
SCHEDULER_CONFIG = "scheduler_config.json"  # in the folder "scheduler"
TIUE_CONFIG = "tiue_config.json"  # how the model is sampled, see sampling.settings
CARD = "README.md"
TORCH_PIPELINE = "pipeline.py"  # the name under which diffusers looks for a custom pipeline
LORA_TEACHER = "lora_teacher"
TOKENIZER_FILES = tokenizer.TOKENIZER_FILES  # all that the reader opens
