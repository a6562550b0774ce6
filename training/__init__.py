"""Staged training: a YAML recipe of stages, each training the parameter groups that it names and nothing else."""
