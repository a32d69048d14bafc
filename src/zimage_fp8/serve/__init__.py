"""VERB serve: a model behind the OpenAI Images API."""

from zimage_fp8.serve.app import ServeOptions, build_app
from zimage_fp8.serve.server import api_keys, serve

__all__ = ["ServeOptions", "api_keys", "build_app", "serve"]
