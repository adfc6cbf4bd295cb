"""Using a model: text, whole or streamed."""

from sparsmith.inference.generate import generate, stream_text

__all__ = ["generate", "stream_text"]
