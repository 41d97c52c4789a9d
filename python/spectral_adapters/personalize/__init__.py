"""Personalisation of text-to-image pipelines: data, pipelines and image similarity."""
