"""`scripts/torture`: faults by the thousand, and what became of each.

    row             what a family of faults offers: rows of attempts
    report          the table
    __main__        the command; runs the families, each in a process of its own

A family is a module with `rows(scratch, seed)`, a context manager that gives its rows and holds what they share (a
server, a recorded run); FAMILIES in __main__ lists them.

It stands on the tests' own parts (tests/faults, tests/servers.py): what is promised is said there, once.
"""
