"""Tasks that isolate what an idea is for, with exact answers and the baselines beside it: a runnable file a task."""
