"""A task of lm-eval's kind on rows of one's own: the beginning of a sentence, and what comes behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write_task(folder: Path, continuations: Sequence[str] = (" warm", " cold")) -> Path:
    """Write the task `sun`, with a row for each continuation of "The sun was"; returns the folder of its file."""
    rows = [{"context": "The sun was", "continuation": continuation} for continuation in continuations]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sun",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "metric_list": [{"metric": "acc"}],
    }
    tasks = folder / "tasks"
    tasks.mkdir()
    # JSON is YAML.
    (tasks / "sun.yaml").write_text(json.dumps(task))
    return tasks
