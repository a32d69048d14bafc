"""VERB serve: a model behind the OpenAI Images API."""

from zimage_fp8.serve.app import ServeOptions, build_app
from zimage_fp8.serve.server import serve

__all__ = ["ServeOptions", "build_app", "serve"]
