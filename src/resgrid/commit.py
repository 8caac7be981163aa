"""The commit that a result was made at, for its record."""

from __future__ import annotations

import subprocess


def git_commit() -> tuple[str, str]:
    """The commit of the current folder's repository, and `true` or `false`: whether tracked files differ.

    Both are `unknown` where there is no git, no repository or no commit yet. dvc.lock may differ: DVC
    rewrites it at each stage.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        all_but_lock = (":(top)", ":(top,exclude,glob)**/dvc.lock")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *all_but_lock)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", "unknown"
    return commit, "true" if changed else "false"
