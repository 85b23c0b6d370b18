"""The web page of `tiue demo`. Only page.py and server.py need Gradio."""
