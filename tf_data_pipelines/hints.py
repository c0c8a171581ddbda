"""Kinds of arguments that many functions take, for their type hints."""

import os

PathLike = str | os.PathLike[str]
PatchSize = int | tuple[int, int]  # of both axes, or (frequency, time)
