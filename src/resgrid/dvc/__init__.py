"""DVC by its command line: the only package that calls `dvc`, and none of the core imports it."""
