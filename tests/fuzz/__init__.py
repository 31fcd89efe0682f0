"""Damaged files for every loader, hostile values for every public call.

``python -m tests.fuzz --files 10000 --calls 3000 --seed 0`` runs cases and groups the failures by cause;
``--only file-17`` (with the same seed) repeats one. ``test_fuzz.py`` runs a fixed part of it.

**The rule.** A case is right if it gives a result, or an `InputError` whose message is one line of at most
`judge.LONGEST` characters. Everything else is a failure: any other exception (also one beside `Exception`, such as a
panic of the tokenizers library), a process that dies, more than 5 s of CPU time, a wait without an end, more than 1 GB
of memory, or a refusal that comes only after an allocation failed. A result must also be right:

- where a hash or a checksum covers what was damaged, the result equals that of the undamaged file;
- elsewhere it passes the target's own check: numbers are finite, ids in range, intact lines are still there.

A value of a wrong type is bad input like any other: InputError. There are two exceptions: Python's own TypeError for a
wrong number or unknown names of arguments; and functions whose docstring does not promise it (`Call.promised` is
False), which may raise any exception for a wrong type, but not for a bad value of the right one.

| file | what it holds |
|---|---|
| `workers.py` | cases in forked processes with bounds, so that a crash or a hang is a result like any other |
| `judge.py` | what is right, and the cause that a failure is grouped under |
| `confinement.py` | nothing outside of the working folder is changed |
| `damage.py` | damages of any file, and other things in its place |
| `formats.py` `archives.py` `edits.py` | damages that know a file's format |
| `specimens.py` | the undamaged files |
| `targets.py` | the loaders: to add one, add a line to `TARGETS` |
| `values.py` `calls.py` | hostile values; the calls: to add one, add a line to `CALLS` |
| `cases.py` | a case: from a seed and a number to a finding |
"""
