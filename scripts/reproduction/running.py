"""Run the cells that have no result yet, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import Cell
from tqdm import tqdm

from eabf_cli.core.files import write_text


def run_missing(cells: Iterable[Cell], folder: Path, *, workers: int) -> None:
    """Measure every cell whose file is not there, or is another cell's.

    A file is written when its cell is finished, so that an interrupted series goes on where it stopped. The models
    are so small that two processes of one thread are faster than one of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in {cell.key: cell for cell in cells}.values() if read_cell(folder, cell) is None]
    if not missing:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as executor:
        futures = {executor.submit(_work, cell): cell for cell in missing}
        try:
            for future in tqdm(as_completed(futures), total=len(missing), unit="run"):
                cell = futures[future]
                write_text(cell_file(folder, cell), json.dumps(future.result(), separators=(",", ":")) + "\n")
                tqdm.write(f"{cell.key}: {future.result()['wall_s']:.0f} s")
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result; None where it is missing, or was measured under other settings."""
    file = cell_file(folder, cell)
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result if result["cell"] == json.loads(json.dumps(asdict(cell))) else None


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where a cell's result is."""
    return folder / f"{cell.key}.json"


def _work(cell: Cell) -> dict[str, Any]:
    # The training stack takes seconds to import, and the parent does without.
    if cell.split == "books":
        from larger_model import measure_larger_model

        return measure_larger_model(cell)
    from measuring import measure_cell

    return measure_cell(cell)
