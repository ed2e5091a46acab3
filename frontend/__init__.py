"""Frontends and the launcher. `from frontend import Client, AsyncClient`; a serving frontend never imports torch."""

from frontend.client import AsyncClient, Client
from frontend.request import Choice, Chunk, Completion, GenerateParams, TokenLogprob
from frontend.session import Patience
from frontend.structured import StructuredOutputs
from frontend.tokenizer import Tokenizer

__all__ = [
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "GenerateParams",
    "Patience",
    "StructuredOutputs",
    "TokenLogprob",
    "Tokenizer",
]
