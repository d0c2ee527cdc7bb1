"""A run seen from outside: its folder and logs, checkpoints, signals and exit statuses, functions of the
user's."""
