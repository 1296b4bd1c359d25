"""The Hugging Face bridge: how an unchanged `transformers` model comes to use the blocks."""
