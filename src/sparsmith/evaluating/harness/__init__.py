"""Benchmarks through lm-evaluation-harness, on the model in memory and files on disk: no hub, no code of a file, no shot from a test set.

`task_files` reads a task's YAML, `templates` renders its texts, `rows` finds and reads its data, `scoring` is the model as the harness sees
it, `running` puts them together, `scores` holds what comes out. The harness's library is an extra (`pip install 'sparsmith[eval]'`) and is
imported by `scoring` and `running` alone.
"""

from __future__ import annotations

from sparsmith.evaluating.harness.running import check_tasks, evaluate_tasks, installed
from sparsmith.evaluating.harness.scores import TaskResult, TaskScores
from sparsmith.evaluating.harness.task_files import TaskFile, built_in_tasks, find_tasks

__all__ = [
    "TaskFile",
    "TaskResult",
    "TaskScores",
    "built_in_tasks",
    "check_tasks",
    "evaluate_tasks",
    "find_tasks",
    "installed",
]
