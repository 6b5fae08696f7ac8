"""One run from its first step to its last: loop, evaluation, checkpoints, records."""
