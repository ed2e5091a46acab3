"""Frontends and the launcher. `from frontend import Client, AsyncClient`; a serving frontend never imports torch."""
