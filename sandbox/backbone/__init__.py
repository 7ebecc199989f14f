"""The Llama 4 text decoder. Has never heard of images."""
