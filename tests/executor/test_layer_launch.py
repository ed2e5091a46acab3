"""Which launches of a kernel go through Triton's search for what it compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from executor.layer_launch import LayerLaunch

GRID = (3, 1, 1)


class Kernel:
    """Like a Triton kernel: notes how it was launched, by `search` or by what was compiled for its `options`."""

    arg_names = ("x", "rows", "width", "flag")

    def __init__(self, *, compiles: bool = True) -> None:
        self.compiles = compiles
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def search(*arguments: object, **options: object) -> object:
            self.launches.append(("search", grid, *arguments))
            return Compiled(self, options) if self.compiles else None

        return search


class Compiled:
    def __init__(self, kernel: Kernel, options: dict[str, object]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.kernel.launches.append((self.options["width"], grid, *arguments))


def test_from_the_second_layer_on_what_was_compiled_is_launched_with_all_arguments_in_order() -> None:
    kernel = Kernel()
    launch = LayerLaunch(kernel)
    narrow = {"flag": True, "width": 64, "num_warps": 4}
    wide = {"flag": False, "width": 128, "num_warps": 4}
    for layer in range(3):
        launch(GRID, (f"x{layer}", 7), narrow)
        launch((layer + 1, 1, 1), (f"x{layer}", 7), wide)
    assert kernel.launches == [
        ("search", GRID, "x0", 7),
        ("search", (1, 1, 1), "x0", 7),
        (64, GRID, "x1", 7, 64, True),
        (128, (2, 1, 1), "x1", 7, 128, False),
        (64, GRID, "x2", 7, 64, True),
        (128, (3, 1, 1), "x2", 7, 128, False),
    ]


def test_a_new_step_searches_again() -> None:
    kernel = Kernel()
    launch = LayerLaunch(kernel)
    options = {"width": 64, "flag": True}
    for rows in (7, 16):
        launch.begin()
        launch(GRID, ("x", rows), options)
    assert [launched[0] for launched in kernel.launches] == ["search", "search"]


def test_the_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    launch = LayerLaunch(kernel)
    options = {"width": 64, "flag": True}
    for _ in range(2):
        launch(GRID, ("x", 7), options)
    assert kernel.launches == [("search", GRID, "x", 7)] * 2
