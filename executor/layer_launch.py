"""Launches of one Triton kernel for layer after layer.

Triton finds what it compiled by all arguments of a launch, which takes 20 us of Python. The layers of a step differ in
addresses alone, so from the second one on the same kernel is launched at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from executor.compile_ahead import launch


class LayerLaunch:
    """One kernel.

    Between two calls of `begin`, launches with the same `options` object differ in addresses alone, aligned alike.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._found: dict[int, tuple[Any, tuple[Any, ...]]] = {}  # by id of the options

    def begin(self) -> None:
        """A new step: numbers may be other ones."""
        self._found.clear()

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """`arguments` come first in the kernel's signature; the rest of it, and how to launch, is in `options`."""
        found = self._found.get(id(options))
        if found is not None:
            compiled, constants = found
            compiled[grid](*arguments, *constants)
            return
        compiled = launch(self._kernel, grid, arguments, options)
        if compiled is not None:  # as it is in Triton's interpreter
            names = self._kernel.arg_names[len(arguments) :]
            self._found[id(options)] = compiled, tuple(options[name] for name in names)
