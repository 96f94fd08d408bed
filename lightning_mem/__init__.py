"""Train diffusion models and watch, attack, protect and explain what they copy from their training images."""

__version__ = "0.1.0"
